package postern

import (
	"encoding/json"
	"math"
	"net/http"
	"strconv"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protojson"
)

// Require refuses HTTP requests that do not meet the demand. [CallerFrom] has the caller of those that do, from the
// context of the request.
//
// A refusal is 401, 403 or 503, with WWW-Authenticate (RFC 6750) or Retry-After and the JSON body that Postern's own
// errors have.
func (v *Verifier) Require(demand Demand, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		caller, err := v.Authorize(r.Context(), r.Header.Values("Authorization"), demand)
		if err != nil {
			writeError(w, ErrorOf(err))
			return
		}
		next.ServeHTTP(w, r.WithContext(withCaller(r.Context(), caller)))
	})
}

// ProtectMux is Require for all routes of a mux at once, by their patterns such as "GET /orders/{id}". A route that is
// not there is refused for everybody. A request without a route gets the 404 or 405 of the mux.
func (v *Verifier) ProtectMux(mux *http.ServeMux, demands Demands) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		demand := Public()
		if _, pattern := mux.Handler(r); pattern != "" {
			demand = demands[pattern]
		}
		v.Require(demand, mux).ServeHTTP(w, r)
	})
}

// writeError writes an error in the form of AIP-193.
func writeError(w http.ResponseWriter, err *Error) {
	httpCode := http.StatusServiceUnavailable
	switch err.Code {
	case codes.Unauthenticated:
		httpCode = http.StatusUnauthorized
		challenge := "Bearer"
		if err.Reason != ReasonTokenMissing {
			challenge += ` error="invalid_token"`
		}
		w.Header().Set("WWW-Authenticate", challenge)
	case codes.PermissionDenied:
		httpCode = http.StatusForbidden
		w.Header().Set("WWW-Authenticate", `Bearer error="insufficient_scope"`)
	}
	if err.RetryDelay > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(err.RetryDelay.Seconds()))))
	}
	details := []json.RawMessage{}
	for _, detail := range err.GRPCStatus().Proto().Details {
		if text, failed := (protojson.MarshalOptions{EmitUnpopulated: true}).Marshal(detail); failed == nil {
			details = append(details, text)
		}
	}
	body, _ := json.Marshal(map[string]any{"error": map[string]any{
		"code": httpCode, "status": code.Code(err.Code).String(), "message": err.Message, "details": details,
	}})
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(httpCode)
	_, _ = w.Write(body)
}
