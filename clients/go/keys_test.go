package postern

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
)

func TestAThousandFirstChecksCauseOneFetch(t *testing.T) {
	key, clock := newSigner("1"), newClock()
	server := newKeyServer(t, key)
	server.delay = 50 * time.Millisecond
	verifier := server.verifier(t, clock, nil)
	token := key.sign(personClaims(clock.now()))
	var group sync.WaitGroup
	for range 1000 {
		group.Go(func() {
			if _, err := verifier.Verify(t.Context(), token); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if fetches := server.fetches.Load(); fetches != 1 {
		t.Fatalf("%d fetches", fetches)
	}
}

func TestASecondFetchWaitsForTheEndOfTheFirst(t *testing.T) {
	key, clock := newSigner("1"), newClock()
	server := newKeyServer(t, key)
	server.delay = 200 * time.Millisecond
	verifier := server.verifier(t, clock, nil)
	var group sync.WaitGroup
	for i := range 3 {
		group.Go(func() { must(verifier.Verify(t.Context(), key.sign(personClaims(clock.now())))) })
		eventually(t, 5*time.Second, "a fetch", func() bool { return server.fetches.Load() > 0 })
		if i < 2 {
			clock.advance(time.Minute)
		}
	}
	group.Wait()
	if fetches := server.fetches.Load(); fetches != 1 {
		t.Fatalf("%d fetches", fetches)
	}
}

func TestACallerThatGivesUpDoesNotEndTheFetchOfTheOthers(t *testing.T) {
	key, clock := newSigner("1"), newClock()
	server := newKeyServer(t, key)
	server.delay = 200 * time.Millisecond
	verifier := server.verifier(t, clock, nil)
	token := key.sign(personClaims(clock.now()))
	impatient, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := verifier.Verify(impatient, token); ErrorOf(err).Code != codes.DeadlineExceeded {
		t.Fatal(err)
	}
	must(verifier.Verify(t.Context(), token))
	if fetches := server.fetches.Load(); fetches != 1 {
		t.Fatalf("%d fetches", fetches)
	}
}

func TestAFloodOfUnknownKeysCausesOneFetchPerCooldown(t *testing.T) {
	key, clock := newSigner("1"), newClock()
	server := newKeyServer(t, key)
	verifier := server.verifier(t, clock, nil)
	for round := range int64(4) {
		var group sync.WaitGroup
		for i := range 200 {
			group.Go(func() {
				unknown := signer{fmt.Sprint("unknown ", round, " ", i), key.key}
				_, err := verifier.Verify(t.Context(), unknown.sign(personClaims(clock.now())))
				if ReasonOf(err) != ReasonTokenInvalid {
					t.Error(err)
				}
			})
		}
		group.Wait()
		if fetches := server.fetches.Load(); fetches != round+1 {
			t.Fatalf("%d fetches in round %d", fetches, round)
		}
		clock.advance(9999 * time.Millisecond)
		unknown := signer{"unknown", key.key}
		_, _ = verifier.Verify(t.Context(), unknown.sign(personClaims(clock.now())))
		if fetches := server.fetches.Load(); fetches != round+1 {
			t.Fatal("a fetch before the cooldown was over")
		}
		clock.advance(time.Millisecond)
	}
}

func TestANewKeyIsFetchedWhenATokenNamesIt(t *testing.T) {
	old, next, clock := newSigner("old"), newSigner("new"), newClock()
	server := newKeyServer(t, old)
	verifier := server.verifier(t, clock, nil)
	must(verifier.Verify(t.Context(), old.sign(personClaims(clock.now()))))
	server.set(false, old, next)
	clock.advance(10 * time.Second)
	must(verifier.Verify(t.Context(), next.sign(personClaims(clock.now()))))
	must(verifier.Verify(t.Context(), old.sign(personClaims(clock.now()))))
	if fetches := server.fetches.Load(); fetches != 2 {
		t.Fatalf("%d fetches", fetches)
	}
}

func TestKeysAreFetchedAgainInTheBackgroundAndAWithdrawnKeyIsRefused(t *testing.T) {
	old, next, clock := newSigner("old"), newSigner("new"), newClock()
	server := newKeyServer(t, old)
	verifier := server.verifier(t, clock, nil)
	token := old.sign(personClaims(clock.now()))
	must(verifier.Verify(t.Context(), token))
	server.set(false, next)
	clock.advance(keysFreshFor - time.Second)
	must(verifier.Verify(t.Context(), token))
	if server.fetches.Load() != 1 {
		t.Fatal("fetched too early")
	}
	clock.advance(time.Second)
	must(verifier.Verify(t.Context(), token)) // it is known, and what this begins is not waited for
	eventually(t, 5*time.Second, "a token that was verified before is refused without its key", func() bool {
		_, err := verifier.Verify(t.Context(), token)
		return ReasonOf(err) == ReasonTokenInvalid
	})
	if server.fetches.Load() != 2 {
		t.Fatalf("%d fetches", server.fetches.Load())
	}
}

func TestAFailedFetchKeepsTheKeysAndCountsForTheCooldown(t *testing.T) {
	key, clock := newSigner("1"), newClock()
	server := newKeyServer(t, key)
	verifier := server.verifier(t, clock, nil)
	server.set(true, key)
	token := key.sign(personClaims(clock.now()))
	for range 3 {
		_, err := verifier.Verify(t.Context(), token)
		wantReason(t, err, ReasonStoreUnavailable)
		if found := ErrorOf(err); found.Code != codes.Unavailable || found.RetryDelay != time.Second || found.Message != "keys unknown" ||
			!strings.Contains(err.Error(), "500 Internal Server Error") {
			t.Fatal(found)
		}
	}
	if server.fetches.Load() != 1 {
		t.Fatalf("%d fetches", server.fetches.Load())
	}
	server.set(false, key)
	clock.advance(10 * time.Second)
	must(verifier.Verify(t.Context(), token))
	server.set(true, key)
	clock.advance(keysFreshFor)
	must(verifier.Verify(t.Context(), token))
	eventually(t, 5*time.Second, "a third fetch", func() bool { return server.fetches.Load() == 3 })
	must(verifier.Verify(t.Context(), token))
}

func TestAKeySetIsReadWithoutTheKeysOfOthers(t *testing.T) {
	key := newSigner("1").jwk()
	changed := func(name string, value any) map[string]any {
		other := newSigner("other").jwk()
		other[name] = value
		return other
	}
	for name, other := range map[string]map[string]any{
		"another curve":     changed("crv", "P-384"),
		"another algorithm": changed("alg", "ES384"),
		"for encryption":    changed("use", "enc"),
		"a secret":          {"kty": "oct", "kid": "secret", "k": "AQAB"},
		"no kid":            changed("kid", ""),
		"a short x":         changed("x", "AQAB"),
		"off the curve":     changed("x", key["x"]),
		"no base64url":      changed("y", "+/"),
	} {
		keys, err := readKeySet(fmt.Appendf(nil, `{"keys": [%s, %s]}`, toJSON(other), toJSON(key)))
		if err != nil || len(keys) != 1 || keys["1"] == nil {
			t.Errorf("%s: %v %v", name, keys, err)
		}
	}
	for _, body := range []string{``, `{}`, `{"keys": []}`, `<html>`, `{"keys": [{"kty": "RSA"}]}`} {
		if keys, err := readKeySet([]byte(body)); err == nil {
			t.Errorf("%s: %v", body, keys)
		}
	}
}
