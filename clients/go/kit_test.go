package postern

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"maps"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
)

const issuer, audience = "https://auth.example.com", "orders"

// clock is one that tests move.
type clock struct{ nanoseconds atomic.Int64 }

func newClock() *clock {
	c := &clock{}
	c.nanoseconds.Store(time.Now().Truncate(time.Second).UnixNano())
	return c
}

func (c *clock) now() time.Time           { return time.Unix(0, c.nanoseconds.Load()) }
func (c *clock) advance(by time.Duration) { c.nanoseconds.Add(int64(by)) }

// signer is a key of the issuer.
type signer struct {
	kid string
	key *ecdsa.PrivateKey
}

func newSigner(kid string) signer {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	return signer{kid, key}
}

func (s signer) jwk() map[string]any {
	point, err := s.key.PublicKey.Bytes()
	if err != nil {
		panic(err)
	}
	encode := base64.RawURLEncoding.EncodeToString
	return map[string]any{
		"kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": s.kid, "x": encode(point[1:33]), "y": encode(point[33:]),
	}
}

func personClaims(now time.Time) map[string]any {
	return map[string]any{
		"iss": issuer, "aud": audience, "sub": "user-1", "sid": "session-1", "jti": "token-1", "client_id": "postern",
		"iat": now.Unix(), "exp": now.Add(15 * time.Minute).Unix(), "username": "ada", "subject_type": "user",
		"email": "ada@example.com", "email_verified": true, "roles": []string{"user"},
	}
}

func serviceClaims(now time.Time) map[string]any {
	claims := personClaims(now)
	delete(claims, "email")
	delete(claims, "email_verified")
	maps.Copy(claims, map[string]any{
		"sub": "service-1", "client_id": "service-1", "sid": "key-1", "jti": "token-2", "subject_type": "service",
		"username": "shop", "roles": []string{},
	})
	return claims
}

func (s signer) sign(claims map[string]any) string {
	body, err := json.Marshal(claims)
	if err != nil {
		panic(err)
	}
	return s.signRaw(`{"typ":"at+jwt","alg":"ES256","kid":"`+s.kid+`"}`, string(body))
}

// signRaw signs any header and body, so that they need not be JSON.
func (s signer) signRaw(header, body string) string {
	encode := base64.RawURLEncoding.EncodeToString
	input := encode([]byte(header)) + "." + encode([]byte(body))
	signature, err := jwt.SigningMethodES256.Sign(input, s.key)
	if err != nil {
		panic(err)
	}
	return input + "." + encode(signature)
}

// keyServer publishes keys, counts the fetches, and can fail.
type keyServer struct {
	*httptest.Server
	fetches atomic.Int64
	mu      sync.Mutex
	signers []signer
	broken  bool
	delay   time.Duration
}

func newKeyServer(t testing.TB, signers ...signer) *keyServer {
	server := &keyServer{signers: signers}
	server.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		server.fetches.Add(1)
		server.mu.Lock()
		defer server.mu.Unlock()
		time.Sleep(server.delay)
		if server.broken || r.URL.Path != "/.well-known/jwks.json" {
			http.Error(w, "no keys here", http.StatusInternalServerError)
			return
		}
		keys := []any{}
		for _, signer := range server.signers {
			keys = append(keys, signer.jwk())
		}
		_ = json.NewEncoder(w).Encode(map[string]any{"keys": keys})
	}))
	t.Cleanup(server.Close)
	return server
}

func (s *keyServer) set(broken bool, signers ...signer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.broken, s.signers = broken, signers
}

func (s *keyServer) verifier(t testing.TB, clock *clock, revocations *RevocationState) *Verifier {
	verifier, err := NewVerifier(VerifierConfig{
		Issuer: issuer, Audience: audience, JWKSURL: s.URL + "/.well-known/jwks.json", Revocations: revocations, Clock: clock.now,
	})
	if err != nil {
		t.Fatal(err)
	}
	return verifier
}

// fakeConn answers unary calls without a network.
type fakeConn func(ctx context.Context, method string, request any) (proto.Message, error)

func (f fakeConn) Invoke(ctx context.Context, method string, request, reply any, _ ...grpc.CallOption) error {
	answer, err := f(ctx, method, request)
	if err == nil {
		proto.Merge(reply.(proto.Message), answer)
	}
	return err
}

func (f fakeConn) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	return nil, &Error{Code: codes.Unimplemented}
}

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

func wantReason(t *testing.T, err error, reason string) {
	t.Helper()
	if got := ReasonOf(err); got != reason {
		t.Fatalf("the reason is %q, not %q: %v", got, reason, err)
	}
}

// eventually waits until this is so, at most for some time.
func eventually(t *testing.T, limit time.Duration, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}
