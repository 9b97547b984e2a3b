package postern

import (
	"encoding/json"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"
)

func toJSON(value any) string { return string(must(json.Marshal(value))) }

// The vectors have most of what is refused. These are the traps of Go's own JSON and base64, which are laxer than Postern.
func TestWhatGoWouldReadButPosternDoesNot(t *testing.T) {
	key, clock := newSigner("1"), newClock()
	verifier := newKeyServer(t, key).verifier(t, clock, nil)
	header := `{"typ":"at+jwt","alg":"ES256","kid":"1"}`
	body, service := toJSON(personClaims(clock.now())), toJSON(serviceClaims(clock.now()))
	good := key.signRaw(header, body)
	must(verifier.Verify(t.Context(), good))
	must(verifier.Verify(t.Context(), key.signRaw(header, service)))
	for name, token := range map[string]string{
		"a claim twice":               key.signRaw(header, strings.Replace(body, `"sub":`, `"sub":"user-2","sub":`, 1)),
		"a claim in capitals":         key.signRaw(header, strings.Replace(body, `"sub":`, `"SUB":`, 1)),
		"a header member twice":       key.signRaw(`{"kid":"2",`+header[1:], body),
		"a header member in capitals": key.signRaw(strings.Replace(header, "kid", "KID", 1), body),
		"another header member":       key.signRaw(`{"cty":"",`+header[1:], body),
		"a null in the header":        key.signRaw(strings.Replace(header, `"1"`, "null", 1), body),
		"a null as a claim":           key.signRaw(header, strings.Replace(body, `"user-1"`, "null", 1)),
		"a null as a role":            key.signRaw(header, strings.Replace(body, `["user"]`, `["user",null]`, 1)),
		"null roles":                  key.signRaw(header, strings.Replace(body, `["user"]`, "null", 1)),
		"a kind that is null":         key.signRaw(header, strings.Replace(body, `"subject_type":"user"`, `"subject_type":null`, 1)),
		"an exponent":                 key.signRaw(header, strings.Replace(body, `"exp":`, `"exp":1e10,"x":`, 1)),
		"no UTF-8":                    key.signRaw(header, strings.Replace(body, "ada\"", "ad\xff\"", 1)),
		"something behind":            key.signRaw(header, body+"{}"),
		"no object":                   key.signRaw(header, "null"),
		"no JSON":                     key.signRaw(header, body[1:]),
		"a line break":                good[:20] + "\n" + good[20:],
		"a line break at the end":     good + "\n",
		"a line break in between":     good[:len(good)-9] + "\r\n" + good[len(good)-9:],
		"another issuer":              key.signRaw(header, strings.Replace(body, issuer, issuer+"/", 1)),
		"another audience":            key.signRaw(header, strings.Replace(body, `"orders"`, `"billing"`, 1)),
		"a list of audiences":         key.signRaw(header, strings.Replace(body, `"orders"`, `["orders"]`, 1)),
		"a service of another client": key.signRaw(header, strings.Replace(service, `"client_id":"service-1"`, `"client_id":"postern"`, 1)),
		"a service with an address":   key.signRaw(header, strings.Replace(service, `"sub"`, `"email":"ada@example.com","sub"`, 1)),
		"another key":                 signer{"1", newSigner("2").key}.signRaw(header, body),
		"padding":                     good + "==",
		"a space":                     good + " ",
		"four segments":               good + ".",
		"two segments":                good[:strings.LastIndex(good, ".")],
		"bits that are left":          good[:len(good)-1] + nextLetter(good[len(good)-1]),
		"more than eight kilobytes":   key.signRaw(header, body+strings.Repeat(" ", maxTokenBytes)),
	} {
		if _, err := verifier.Verify(t.Context(), token); ReasonOf(err) != ReasonTokenInvalid {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// nextLetter is the letter of base64url after this one: for the last letter of 64 bytes, it differs in bits that mean nothing.
func nextLetter(letter byte) string {
	return string(base64url[strings.IndexByte(base64url, letter)+1])
}

func TestTheTimesHaveALeewayOfFiveSeconds(t *testing.T) {
	key, clock := newSigner("1"), newClock()
	verifier := newKeyServer(t, key).verifier(t, clock, nil)
	for _, c := range []struct {
		expiresIn, issuedIn time.Duration
		reason              string
	}{
		{time.Second, 0, ""},
		{-4 * time.Second, -time.Minute, ""},
		{-5 * time.Second, -time.Minute, ReasonTokenExpired},
		{time.Minute, 5 * time.Second, ""},
		{time.Minute, 6 * time.Second, ReasonTokenInvalid},
		{-5 * time.Second, 6 * time.Second, ReasonTokenExpired},
	} {
		claims := personClaims(clock.now())
		claims["exp"], claims["iat"] = clock.now().Add(c.expiresIn).Unix(), clock.now().Add(c.issuedIn).Unix()
		_, err := verifier.Verify(t.Context(), key.sign(claims))
		if ReasonOf(err) != c.reason {
			t.Errorf("%+v: %v", c, err)
		}
	}
	for _, exp := range []string{"9223372036854775807", "-9223372036854775808"} {
		body := strings.Replace(toJSON(personClaims(clock.now())), `"exp":`, `"exp":`+exp+`,"x":`, 1)
		_, err := verifier.Verify(t.Context(), key.signRaw(`{"typ":"at+jwt","alg":"ES256","kid":"1"}`, body))
		if (exp[0] == '-') != (ReasonOf(err) == ReasonTokenExpired) {
			t.Errorf("%s: %v", exp, err)
		}
	}
}

func TestATokenThatWasVerifiedBeforeExpiresAllTheSame(t *testing.T) {
	key, clock := newSigner("1"), newClock()
	verifier := newKeyServer(t, key).verifier(t, clock, nil)
	token := key.sign(personClaims(clock.now()))
	caller := must(verifier.Verify(t.Context(), token))
	if len(verifier.verified.young) != 1 {
		t.Fatal("it is not remembered")
	}
	caller.Roles[0] = "admin" // what one caller does to the result is not seen by another one
	if caller = must(verifier.Verify(t.Context(), token)); !caller.HasRole("user") || caller.HasRole("admin") {
		t.Fatal(caller.Roles)
	}
	clock.advance(15*time.Minute + 5*time.Second)
	_, err := verifier.Verify(t.Context(), token)
	wantReason(t, err, ReasonTokenExpired)
}

func TestATokenOfBeforeThereWereServicesIsThatOfAPerson(t *testing.T) {
	key, clock := newSigner("1"), newClock()
	verifier := newKeyServer(t, key).verifier(t, clock, nil)
	claims := personClaims(clock.now())
	delete(claims, "subject_type")
	if caller := must(verifier.Verify(t.Context(), key.sign(claims))); caller.SubjectType != SubjectUser {
		t.Fatal(caller)
	}
}

func TestTheCacheOfTokensIsBoundedAndKeepsWhatIsUsed(t *testing.T) {
	var cache tokenCache
	used := &verifiedToken{kid: "used"}
	cache.put([32]byte{1}, used)
	for i := range 3 * rememberedTokens {
		digest := [32]byte{2, byte(i), byte(i >> 8), byte(i >> 16)}
		cache.put(digest, &verifiedToken{})
		if len(cache.young)+len(cache.old) > rememberedTokens {
			t.Fatalf("%d tokens are remembered", len(cache.young)+len(cache.old))
		}
		if i%1000 == 0 && cache.get([32]byte{1}) != used {
			t.Fatal("a token that is used is forgotten")
		}
	}
	if cache.get([32]byte{2}) != nil {
		t.Fatal("a token that is not used is remembered")
	}
}

func TestAVerifierNeedsAnIssuerAndAnAudience(t *testing.T) {
	for _, config := range []VerifierConfig{{}, {Issuer: issuer}, {Audience: audience}} {
		if _, err := NewVerifier(config); err == nil {
			t.Errorf("%+v", config)
		}
	}
}

// go test -run '^$' -bench Verify -cpu 1
func BenchmarkVerify(b *testing.B) {
	key, clock := newSigner("1"), newClock()
	state := must(NewRevocationState(RevocationConfig{WhenUnknown: RefuseWhenUnknown, Clock: clock.now}))
	state.Apply(heartbeat(clock.now()))
	for i := range 10_000 {
		state.Apply(ended(fmt.Sprint("session of others ", i), clock.now().Add(time.Hour)))
	}
	verifier := newKeyServer(b, key).verifier(b, clock, state)
	tokens := make([]string, 5000)
	for i := range tokens {
		claims := maps.Clone(personClaims(clock.now()))
		claims["jti"] = fmt.Sprint(i)
		tokens[i] = key.sign(claims)
		must(verifier.Verify(b.Context(), tokens[i]))
	}
	b.Run("known", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			must(verifier.Verify(b.Context(), tokens[i%len(tokens)]))
		}
		b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "checks/s")
	})
	b.Run("new", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			verifier.verified = tokenCache{}
			must(verifier.Verify(b.Context(), tokens[i%len(tokens)]))
		}
		b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "checks/s")
	})
}
