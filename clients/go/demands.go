package postern

import (
	"context"
	"strings"
)

// Demand is what a method wants of its caller: [Public], [Authenticated], [User] or [Service], and perhaps a role or a
// verified address. The zero Demand refuses everybody.
type Demand struct {
	kind          demandKind
	role          string
	verifiedEmail bool
}

type demandKind int

const (
	demandUndeclared demandKind = iota
	demandPublic
	demandAuthenticated
	demandUser
	demandService
)

// Public lets everybody in. A token is ignored, also an invalid one, and there is no [Caller].
func Public() Demand { return Demand{kind: demandPublic} }

// Authenticated wants a person or a service.
func Authenticated() Demand { return Demand{kind: demandAuthenticated} }

// User wants a person.
func User() Demand { return Demand{kind: demandUser} }

// Service wants a service account.
func Service() Demand { return Demand{kind: demandService} }

// WithRole wants this role too.
func (d Demand) WithRole(role string) Demand {
	d.role = role
	return d
}

// WithVerifiedEmail wants a verified address too. A service has none, and is refused.
func (d Demand) WithVerifiedEmail() Demand {
	d.verifiedEmail = true
	return d
}

// Authorize decides about a call, given the values of its `authorization` header or metadata. The caller is nil if the
// demand is [Public].
//
// Besides the errors of [Verifier.Verify] it fails with codes.Unauthenticated ([ReasonTokenMissing]) or
// codes.PermissionDenied ([ReasonUserRequired], [ReasonServiceRequired], [ReasonRoleRequired],
// [ReasonEmailNotVerified]).
func (v *Verifier) Authorize(ctx context.Context, authorization []string, demand Demand) (*Caller, error) {
	switch {
	case demand == Public(): // and nothing more
		return nil, nil
	case demand.kind == demandUndeclared:
		return nil, errRoleRequired
	}
	token, err := bearerToken(authorization)
	if err != nil {
		return nil, err
	}
	caller, err := v.Verify(ctx, token)
	if err != nil {
		return nil, err
	}
	switch {
	case demand.kind == demandUser && caller.SubjectType != SubjectUser:
		return nil, errUserRequired
	case demand.kind == demandService && caller.SubjectType != SubjectService:
		return nil, errServiceRequired
	case demand.role != "" && !caller.HasRole(demand.role):
		return nil, errRoleRequired
	case demand.verifiedEmail && !caller.EmailVerified:
		return nil, errNotVerified
	}
	return caller, nil
}

// bearerToken is the token of the one `authorization` value (RFC 6750, 2.1). Another scheme counts as no token.
func bearerToken(values []string) (string, error) {
	if len(values) == 0 {
		return "", errTokenMissing
	}
	notASCII := func(r rune) bool { return r > '~' || (r < ' ' && r != '\t') }
	if len(values) > 1 || strings.ContainsFunc(values[0], notASCII) {
		return "", errTokenInvalid
	}
	scheme, token, _ := strings.Cut(values[0], " ")
	if !strings.EqualFold(scheme, "bearer") {
		return "", errTokenMissing
	}
	return strings.TrimLeft(token, " "), nil
}

type callerKey struct{}

// CallerFrom returns the caller of the call or request whose context this is. There is none if the demand was [Public].
func CallerFrom(ctx context.Context) (*Caller, bool) {
	caller, ok := ctx.Value(callerKey{}).(*Caller)
	return caller, ok
}

func withCaller(ctx context.Context, caller *Caller) context.Context {
	if caller == nil {
		return ctx
	}
	return context.WithValue(ctx, callerKey{}, caller)
}
