package postern

import (
	"context"
	"crypto/sha256"
	"errors"
	"net/http"
	"slices"
	"strings"
	"time"
)

const (
	// No token of Postern is longer.
	maxTokenBytes = 8 * 1024
	// How far the clock of the issuer may be ahead, for iat, or behind, for exp, in seconds. Postern has the same.
	leeway = 5
	// How many verified tokens are remembered.
	rememberedTokens = 10_000
)

// VerifierConfig says which tokens a [Verifier] accepts.
type VerifierConfig struct {
	Issuer   string // the iss of the tokens, byte for byte: POSTERN_ISSUER. Required.
	Audience string // the aud of the tokens: POSTERN_AUDIENCE. Required.
	// Where the public keys are. Default: <Issuer>/.well-known/jwks.json.
	JWKSURL string
	// The client that fetches the keys. Default: http.DefaultClient. A fetch ends after 5 s in any case.
	HTTPClient *http.Client
	// The shortest time between two fetches of the keys. Default: 10 s.
	KeyCooldown time.Duration
	// What was revoked: the State of a [RevocationFeed]. Without it (nil), a token is accepted until it expires.
	Revocations *RevocationState
	// Default: time.Now.
	Clock func() time.Time
}

// Verifier checks access tokens offline, with the same rules as Postern.
//
// It fetches the public keys when the first token comes, when a token names an unknown key, and every five minutes in
// the background of a check. Tokens that were verified before cost no signature check; whether their key is still
// published, whether they have expired and whether they were revoked is checked each time.
type Verifier struct {
	issuer, audience string
	keys             *keySet
	verified         tokenCache
	revocations      *RevocationState
	clock            func() time.Time
}

// NewVerifier fails if the issuer or the audience is missing. It fetches nothing.
func NewVerifier(config VerifierConfig) (*Verifier, error) {
	if config.Issuer == "" || config.Audience == "" {
		return nil, errors.New("postern: a verifier needs an issuer and an audience")
	}
	if config.JWKSURL == "" {
		config.JWKSURL = strings.TrimSuffix(config.Issuer, "/") + "/.well-known/jwks.json"
	}
	if config.HTTPClient == nil {
		config.HTTPClient = http.DefaultClient
	}
	if config.KeyCooldown <= 0 {
		config.KeyCooldown = 10 * time.Second
	}
	if config.Clock == nil {
		config.Clock = time.Now
	}
	keys := &keySet{url: config.JWKSURL, client: config.HTTPClient, cooldown: config.KeyCooldown, clock: config.Clock}
	return &Verifier{
		issuer:      config.Issuer,
		audience:    config.Audience,
		keys:        keys,
		revocations: config.Revocations,
		clock:       config.Clock,
	}, nil
}

// Verify returns whom an access token stands for. The result belongs to the caller of Verify.
//
// It fails with an [Error]: codes.Unauthenticated with [ReasonTokenInvalid], [ReasonTokenExpired] or
// [ReasonSessionRevoked]; codes.Unavailable with [ReasonStoreUnavailable] if there are no keys, or if the revocations
// are unknown and [RefuseWhenUnknown] was chosen; codes.Canceled or codes.DeadlineExceeded if the context ends while
// the keys are fetched.
func (v *Verifier) Verify(ctx context.Context, token string) (*Caller, error) {
	if len(token) > maxTokenBytes {
		return nil, errTokenInvalid
	}
	digest := sha256.Sum256([]byte(token))
	verified := v.verified.get(digest)
	isNew := verified == nil
	if isNew {
		verified = readToken(token)
		if verified == nil || verified.iss != v.issuer || verified.aud != v.audience {
			return nil, errTokenInvalid
		}
	}
	key, err := v.keys.find(ctx, verified.kid)
	if err != nil {
		return nil, err
	}
	if isNew {
		if verified.alg != key.method.Alg() || key.method.Verify(verified.signedInput, verified.signature, key.key) != nil {
			return nil, errTokenInvalid
		}
		verified.signedInput, verified.signature = "", nil
		v.verified.put(digest, verified)
	}
	now := v.clock()
	if now.Unix() >= verified.exp+leeway {
		return nil, errTokenExpired
	}
	if verified.iat > now.Unix()+leeway {
		return nil, errTokenInvalid // a clock was wrong, and the token would outlive what revokes it
	}
	caller := verified.caller
	caller.Roles = slices.Clone(caller.Roles)
	if v.revocations != nil {
		if err := v.revocations.check(&caller); err != nil {
			return nil, err
		}
	}
	return &caller, nil
}
