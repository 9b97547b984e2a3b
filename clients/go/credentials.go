package postern

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"

	authv1 "github.com/postern-auth/postern/clients/go/postern/auth/v1"
)

// NewServiceTokenSource gets the tokens of a service account for its client id and the secret of one of its keys.
//
// The connection leads to Postern. It may have the call credentials of this source: calls that get tokens go without.
func NewServiceTokenSource(conn grpc.ClientConnInterface, clientID, clientSecret string) *TokenSource {
	client := authv1.NewTokenServiceClient(conn)
	request := &authv1.IssueServiceTokenRequest{ClientId: clientID, ClientSecret: clientSecret}
	return &TokenSource{obtain: func(ctx context.Context) (grant, error) {
		answer, err := client.IssueServiceToken(ctx, request)
		if err != nil {
			return grant{}, err
		}
		return newGrant(answer.AccessToken, answer.AccessTokenExpireTime), nil
	}}
}

// NewLoginTokenSource gets the tokens of a person who logs in with email and password, and again when the session has
// ended. With a store that has a refresh token, that session is continued. Without a store (nil), the refresh token is
// kept in memory.
func NewLoginTokenSource(conn grpc.ClientConnInterface, email, password string, store RefreshTokenStore) *TokenSource {
	if store == nil {
		store = NewMemoryStore("")
	}
	login := &authv1.LoginRequest{Email: email, Password: password}
	return &TokenSource{obtain: session{authv1.NewAuthServiceClient(conn), store, login}.obtain}
}

// NewRefreshTokenSource gets the tokens of a session whose refresh token the store has, such as [NewMemoryStore] of a
// given one. When the session has ended, it fails with [ReasonRefreshTokenInvalid], until somebody puts another refresh
// token into the store.
func NewRefreshTokenSource(conn grpc.ClientConnInterface, store RefreshTokenStore) *TokenSource {
	return &TokenSource{obtain: session{authv1.NewAuthServiceClient(conn), store, nil}.obtain}
}

// session is a person's, which is continued with its refresh token.
type session struct {
	client authv1.AuthServiceClient
	store  RefreshTokenStore
	login  *authv1.LoginRequest // nil without a password
}

func (s session) obtain(ctx context.Context) (grant, error) {
	refreshToken, err := s.store.Load(ctx)
	if err != nil {
		return grant{}, err
	}
	var ended error = refusal(codes.Unauthenticated, ReasonRefreshTokenInvalid, "there is no refresh token")
	if refreshToken != "" {
		answer, err := s.client.Refresh(ctx, &authv1.RefreshRequest{RefreshToken: refreshToken})
		if err == nil {
			return s.keep(ctx, answer.Tokens)
		}
		if ReasonOf(err) != ReasonRefreshTokenInvalid {
			return grant{}, err
		}
		if err := s.store.Save(ctx, ""); err != nil {
			return grant{}, err
		}
		ended = err
	}
	if s.login == nil {
		return grant{}, ended
	}
	answer, err := s.client.Login(ctx, s.login)
	if err != nil {
		return grant{}, err
	}
	return s.keep(ctx, answer.Tokens)
}

// keep stores the refresh token before anybody gets the access token. If it cannot be stored, nobody does: then the old
// refresh token still leads to the new one.
func (s session) keep(ctx context.Context, tokens *authv1.TokenPair) (grant, error) {
	if err := s.store.Save(ctx, tokens.GetRefreshToken()); err != nil {
		return grant{}, err
	}
	return newGrant(tokens.GetAccessToken(), tokens.GetAccessTokenExpireTime()), nil
}

// Credentials puts the token into the calls of a connection with TLS: grpc.WithPerRPCCredentials(source.Credentials()).
func (s *TokenSource) Credentials() credentials.PerRPCCredentials {
	return callCredentials{s, true}
}

// PlaintextCredentials is [TokenSource.Credentials] that also works without TLS. Everybody on the way can read the
// token: use it where a mesh encrypts, and in tests.
func (s *TokenSource) PlaintextCredentials() credentials.PerRPCCredentials {
	return callCredentials{s, false}
}

type callCredentials struct {
	source *TokenSource
	tls    bool
}

func (c callCredentials) RequireTransportSecurity() bool { return c.tls }

func (c callCredentials) GetRequestMetadata(ctx context.Context, _ ...string) (map[string]string, error) {
	if ctx.Value(bareCall{}) != nil {
		return nil, nil
	}
	token, err := c.source.Token(ctx)
	if err != nil {
		return nil, ErrorOf(err).GRPCStatus().Err()
	}
	return map[string]string{"authorization": "Bearer " + token}, nil
}

// bareCall marks the context of a call that must not wait for a token, because it gets one, or has one already.
type bareCall struct{}

func withoutCallCredentials(ctx context.Context) context.Context {
	return context.WithValue(ctx, bareCall{}, true)
}
