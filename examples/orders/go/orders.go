package main

import (
	"encoding/json"
	"net/http"
	"slices"
	"strconv"
	"sync"

	postern "github.com/postern-auth/postern/clients/go"
)

type order struct {
	ID    int    `json:"id"`
	Owner string `json:"owner"`
	Item  string `json:"item"`
}

// orders has them in memory.
type orders struct {
	mu     sync.Mutex
	lastID int
	all    []order
}

// newHandler says what each route wants of its caller. A route that the second list does not have is refused for everybody.
func newHandler(verifier *postern.Verifier) http.Handler {
	orders, mux := &orders{}, http.NewServeMux()
	mux.HandleFunc("GET /orders", orders.list)
	mux.HandleFunc("POST /orders", orders.create)
	mux.HandleFunc("DELETE /orders/{id}", orders.remove)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok")) })
	return verifier.ProtectMux(mux, postern.Demands{
		"GET /orders":         postern.Authenticated(),
		"POST /orders":        postern.User(),
		"DELETE /orders/{id}": postern.Authenticated().WithRole("admin"),
		"GET /healthz":        postern.Public(),
	})
}

func (o *orders) list(w http.ResponseWriter, r *http.Request) {
	caller, _ := postern.CallerFrom(r.Context())
	visible := []order{}
	o.mu.Lock()
	for _, order := range o.all {
		if caller.SubjectType == postern.SubjectService || order.Owner == caller.Subject {
			visible = append(visible, order)
		}
	}
	o.mu.Unlock()
	answer(w, http.StatusOK, map[string][]order{"orders": visible})
}

func (o *orders) create(w http.ResponseWriter, r *http.Request) {
	caller, _ := postern.CallerFrom(r.Context())
	created := order{Owner: caller.Subject}
	body := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<16))
	if err := body.Decode(&struct{ Item *string }{&created.Item}); err != nil || created.Item == "" {
		http.Error(w, `the body is {"item": "…"}`, http.StatusBadRequest)
		return
	}
	o.mu.Lock()
	o.lastID++
	created.ID = o.lastID
	o.all = append(o.all, created)
	o.mu.Unlock()
	answer(w, http.StatusCreated, created)
}

func (o *orders) remove(w http.ResponseWriter, r *http.Request) {
	id, _ := strconv.Atoi(r.PathValue("id"))
	o.mu.Lock()
	before := len(o.all)
	o.all = slices.DeleteFunc(o.all, func(order order) bool { return order.ID == id })
	after := len(o.all)
	o.mu.Unlock()
	if after == before {
		http.NotFound(w, r)
	} else {
		w.WriteHeader(http.StatusNoContent)
	}
}

func answer(w http.ResponseWriter, code int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body)
}
