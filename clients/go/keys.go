package postern

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/golang-jwt/jwt/v5"
	"google.golang.org/grpc/codes"
)

const (
	// How long keys are used before they are fetched again, which is what their Cache-Control says.
	keysFreshFor = 5 * time.Minute
	// How long a fetch may take.
	fetchTimeout = 5 * time.Second
	// No JWK Set of Postern is larger.
	maxKeySetBytes = 1 << 20
)

// publicKey is a key, and the only algorithm that it is for: a token does not choose it.
type publicKey struct {
	method jwt.SigningMethod
	key    any
}

// keySet has the public keys of the issuer. One fetch is in flight at a time, and at most one begins per cooldown.
type keySet struct {
	url      string
	client   *http.Client
	cooldown time.Duration
	clock    func() time.Time

	mu       sync.Mutex
	keys     map[string]*publicKey // by kid; nil before the first fetch that succeeded
	keysTime time.Time             // when these keys were asked for
	fetch    chan struct{}         // closed when the fetch that is in flight ends; nil if there is none
	askTime  time.Time             // when the last fetch began
	failure  error                 // of the last fetch
}

// find returns a key. For an unknown kid it waits for a fetch, if one is in flight or may begin.
func (s *keySet) find(ctx context.Context, kid string) (*publicKey, error) {
	key, fetch := s.look(kid)
	if key == nil && fetch != nil {
		select {
		case <-fetch:
			key, _ = s.look(kid)
		case <-ctx.Done():
			return nil, ErrorOf(ctx.Err())
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case key != nil:
		return key, nil
	case s.keys == nil:
		unknown := refusal(codes.Unavailable, ReasonStoreUnavailable, "keys unknown")
		unknown.cause = s.failure
		return nil, unknown
	}
	return nil, errTokenInvalid
}

// look returns a key that is known, or nil, and the fetch that is in flight, or nil. It begins one if one is due.
func (s *keySet) look(kid string) (*publicKey, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now, key := s.clock(), s.keys[kid]
	isDue := key == nil || now.Sub(s.keysTime) >= keysFreshFor
	mayBegin := s.askTime.IsZero() || now.Sub(s.askTime) >= s.cooldown
	if isDue && mayBegin && s.fetch == nil {
		s.fetch, s.askTime = make(chan struct{}), now
		go s.refresh(now)
	}
	return key, s.fetch
}

// refresh replaces the keys: one that is no longer published is no longer accepted. If it fails, the keys stay.
func (s *keySet) refresh(now time.Time) {
	keys, err := s.download()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failure = err; err == nil {
		s.keys, s.keysTime = keys, now
	}
	close(s.fetch)
	s.fetch = nil
}

func (s *keySet) download() (map[string]*publicKey, error) {
	ctx, cancel := context.WithTimeout(context.Background(), fetchTimeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url, nil)
	if err != nil {
		return nil, err
	}
	response, err := s.client.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answers %s", s.url, response.Status)
	}
	body, err := io.ReadAll(io.LimitReader(response.Body, maxKeySetBytes))
	if err != nil {
		return nil, err
	}
	return readKeySet(body)
}

// readKeySet reads the keys of a JWK Set (RFC 7517) that are for signatures of an algorithm that Postern has. It skips all
// others, and fails if none is left.
func readKeySet(body []byte) (map[string]*publicKey, error) {
	var set struct{ Keys []json.RawMessage }
	if err := json.Unmarshal(body, &set); err != nil {
		return nil, err
	}
	keys := map[string]*publicKey{}
	for _, text := range set.Keys {
		// Each on its own: the library refuses a whole set for one key that it cannot read.
		var jwk jose.JSONWebKey
		if jwk.UnmarshalJSON(text) != nil {
			continue
		}
		method := methodOf(jwk.Key)
		isOurs := method != nil && jwk.KeyID != "" && (jwk.Use == "" || jwk.Use == "sig")
		if isOurs && (jwk.Algorithm == "" || jwk.Algorithm == method.Alg()) {
			keys[jwk.KeyID] = &publicKey{method, jwk.Key}
		}
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("the JWK Set has no key that Postern could sign with")
	}
	return keys, nil
}

// methodOf is the only algorithm that a key is for; nil if Postern has no such keys.
func methodOf(key any) jwt.SigningMethod {
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		if key.Curve == elliptic.P256() {
			return jwt.SigningMethodES256
		}
	case ed25519.PublicKey:
		return jwt.SigningMethodEdDSA
	case *rsa.PublicKey:
		return jwt.SigningMethodRS256
	}
	return nil
}
