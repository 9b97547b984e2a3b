package postern

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

func TestTheMiddlewareOfAMuxRefusesAsPosternDoes(t *testing.T) {
	key, clock := newSigner("1"), newClock()
	state := must(NewRevocationState(RevocationConfig{WhenUnknown: RefuseWhenUnknown, Clock: clock.now}))
	verifier := newKeyServer(t, key).verifier(t, clock, state)
	state.Apply(heartbeat(clock.now()))
	mux := http.NewServeMux()
	show := func(w http.ResponseWriter, r *http.Request) {
		caller, ok := CallerFrom(r.Context())
		if !ok {
			caller = &Caller{Subject: "nobody"}
		}
		_, _ = fmt.Fprint(w, caller.Subject, " ", r.PathValue("id"))
	}
	for _, pattern := range []string{"GET /orders/{id}", "POST /orders", "DELETE /orders/{id}", "GET /healthz"} {
		mux.HandleFunc(pattern, show)
	}
	handler := verifier.ProtectMux(mux, Demands{
		"GET /orders/{id}": Authenticated(), "POST /orders": User().WithRole("buyer"), "GET /healthz": Public(),
	})
	person := "Bearer " + key.sign(personClaims(clock.now()))
	expired := personClaims(clock.now().Add(-time.Hour))
	const denied = `Bearer error="insufficient_scope"`
	for _, c := range []struct {
		method, path  string
		authorization []string
		code          int
		challenge     string
		body          string
	}{
		{"GET", "/orders/7", []string{person}, 200, "", "user-1 7"},
		{"GET", "/healthz", []string{"Bearer nonsense"}, 200, "", "nobody "},
		{"GET", "/elsewhere", nil, 404, "", "404 page not found\n"},
		{"PUT", "/orders", nil, 405, "", "Method Not Allowed\n"},
		{"GET", "/orders/7", nil, 401, "Bearer", errorBody(401, "UNAUTHENTICATED", "this call needs an access token", "TOKEN_MISSING")},
		{"GET", "/orders/7", []string{"Bearer a.b.c"}, 401, `Bearer error="invalid_token"`, errorBody(401, "UNAUTHENTICATED", "the access token is invalid", "TOKEN_INVALID")},
		{"GET", "/orders/7", []string{person, person}, 401, `Bearer error="invalid_token"`, errorBody(401, "UNAUTHENTICATED", "the access token is invalid", "TOKEN_INVALID")},
		{"GET", "/orders/7", []string{"Bearer " + key.sign(expired)}, 401, `Bearer error="invalid_token"`, errorBody(401, "UNAUTHENTICATED", "the access token has expired", "TOKEN_EXPIRED")},
		{"POST", "/orders", []string{person}, 403, denied, errorBody(403, "PERMISSION_DENIED", "the caller lacks the role that this call needs", "ROLE_REQUIRED")},
		{"DELETE", "/orders/7", []string{person}, 403, denied, errorBody(403, "PERMISSION_DENIED", "the caller lacks the role that this call needs", "ROLE_REQUIRED")},
	} {
		request := httptest.NewRequest(c.method, c.path, nil)
		request.Header["Authorization"] = c.authorization
		recorder := httptest.NewRecorder()
		handler.ServeHTTP(recorder, request)
		response := recorder.Result()
		body := string(must(io.ReadAll(response.Body)))
		if response.StatusCode != c.code || response.Header.Get("WWW-Authenticate") != c.challenge || body != c.body {
			t.Errorf("%s %s %.20q: %d %v\n%s", c.method, c.path, c.authorization, response.StatusCode, response.Header, body)
		}
		if strings.HasPrefix(body, "{") && response.Header.Get("Content-Type") != "application/json" {
			t.Error(response.Header)
		}
	}

	clock.advance(31 * time.Second)
	request := httptest.NewRequest("GET", "/orders/7", nil)
	request.Header.Set("Authorization", person)
	recorder := httptest.NewRecorder()
	handler.ServeHTTP(recorder, request)
	if recorder.Code != 503 || recorder.Header().Get("Retry-After") != "1" || recorder.Header().Get("WWW-Authenticate") != "" ||
		!strings.Contains(recorder.Body.String(), `"message":"revocations unknown","status":"UNAVAILABLE"`) {
		t.Error(recorder.Code, recorder.Header(), recorder.Body)
	}
}

func errorBody(code int, status, message, reason string) string {
	return fmt.Sprintf(`{"error":{"code":%d,"details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":%q,"domain":"postern.auth.v1","metadata":{}}],"message":%q,"status":%q}}`,
		code, reason, message, status)
}
