package postern

import (
	"testing"
)

func TestEveryDemandAgainstEveryCaller(t *testing.T) {
	key, clock := newSigner("1"), newClock()
	verifier := newKeyServer(t, key).verifier(t, clock, nil)
	sign := func(claims map[string]any, roles []string, verified bool) string {
		claims["roles"] = roles
		if _, ok := claims["email"]; ok {
			claims["email_verified"] = verified
		}
		return "Bearer " + key.sign(claims)
	}
	now := clock.now()
	authorizations := map[string][]string{
		"nobody":     nil,
		"a forger":   {"Bearer a.b.c"},
		"a person":   {sign(personClaims(now), []string{"user"}, true)},
		"unverified": {sign(personClaims(now), []string{"user"}, false)},
		"an admin":   {sign(personClaims(now), []string{"user", "admin"}, false)},
		"a service":  {sign(serviceClaims(now), []string{}, false)},
		"automation": {sign(serviceClaims(now), []string{"admin"}, false)},
	}
	const missing, invalid, role = ReasonTokenMissing, ReasonTokenInvalid, ReasonRoleRequired
	type reasons map[string]string
	for _, c := range []struct {
		name   string
		demand Demand
		want   reasons
	}{
		{"undeclared", Demand{}, reasons{"nobody": role, "a forger": role, "a person": role, "unverified": role, "an admin": role, "a service": role, "automation": role}},
		{"public", Public(), reasons{}},
		{"authenticated", Authenticated(), reasons{"nobody": missing, "a forger": invalid}},
		{"public, with a role", Public().WithRole("admin"), reasons{"nobody": missing, "a forger": invalid, "a person": role, "unverified": role, "a service": role}},
		{"undeclared, with a role", Demand{}.WithRole("user"), reasons{"nobody": role, "a forger": role, "a person": role, "unverified": role, "an admin": role, "a service": role, "automation": role}},
		{"user", User(), reasons{"nobody": missing, "a forger": invalid, "a service": ReasonUserRequired, "automation": ReasonUserRequired}},
		{"service", Service(), reasons{"nobody": missing, "a forger": invalid, "a person": ReasonServiceRequired, "unverified": ReasonServiceRequired, "an admin": ReasonServiceRequired}},
		{"admin", Authenticated().WithRole("admin"), reasons{"nobody": missing, "a forger": invalid, "a person": role, "unverified": role, "a service": role}},
		{"user admin", User().WithRole("admin"), reasons{"nobody": missing, "a forger": invalid, "a person": role, "unverified": role, "a service": ReasonUserRequired, "automation": ReasonUserRequired}},
		{"verified", Authenticated().WithVerifiedEmail(), reasons{"nobody": missing, "a forger": invalid, "unverified": ReasonEmailNotVerified, "an admin": ReasonEmailNotVerified, "a service": ReasonEmailNotVerified, "automation": ReasonEmailNotVerified}},
		{"verified admin", User().WithRole("admin").WithVerifiedEmail(), reasons{"nobody": missing, "a forger": invalid, "a person": role, "unverified": role, "an admin": ReasonEmailNotVerified, "a service": ReasonUserRequired, "automation": ReasonUserRequired}},
	} {
		for who, authorization := range authorizations {
			caller, err := verifier.Authorize(t.Context(), authorization, c.demand)
			if ReasonOf(err) != c.want[who] {
				t.Errorf("%s where %s is wanted: %v", who, c.name, err)
			}
			if wantCaller := err == nil && c.name != "public"; (caller != nil) != wantCaller {
				t.Errorf("%s where %s is wanted: the caller is %v", who, c.name, caller)
			}
		}
	}
}

func TestExactlyOneBearerTokenIsRead(t *testing.T) {
	for _, c := range []struct {
		values []string
		token  string
		reason string
	}{
		{[]string{"Bearer a.b.c"}, "a.b.c", ""},
		{[]string{"bEARER   a.b.c"}, "a.b.c", ""},
		{[]string{"Bearer"}, "", ""}, // an empty token, which is invalid
		{nil, "", ReasonTokenMissing},
		{[]string{"Basic YTpi"}, "", ReasonTokenMissing},
		{[]string{""}, "", ReasonTokenMissing},
		{[]string{"Bearers a.b.c"}, "", ReasonTokenMissing},
		{[]string{"Bearer a.b.c", "Bearer a.b.c"}, "", ReasonTokenInvalid},
		{[]string{"Bearer a.b.c", "Basic YTpi"}, "", ReasonTokenInvalid},
		{[]string{"Bearer \u00e9"}, "", ReasonTokenInvalid},
	} {
		token, err := bearerToken(c.values)
		if token != c.token || ReasonOf(err) != c.reason {
			t.Errorf("%q: %q, %v", c.values, token, err)
		}
	}
}
