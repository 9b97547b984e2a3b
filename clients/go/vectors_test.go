package postern

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	authv1 "github.com/postern-auth/postern/clients/go/postern/auth/v1"
)

// The vectors are made by the real server, and judged by it.
func TestStageEveryVectorHasTheVerdictOfTheServer(t *testing.T) {
	var vectors struct {
		Issuer, Audience string
		JWKS             json.RawMessage
		Cases            []struct {
			Name, Token string
			Demand      struct {
				SubjectType string `json:"subject_type"`
				Role        string
			}
			Revocations []json.RawMessage
			Verdict     string
			Caller      *Caller
		}
	}
	if err := json.Unmarshal(must(os.ReadFile(variable(t, "POSTERN_VECTORS"))), &vectors); err != nil {
		t.Fatal(err)
	}
	keys := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(vectors.JWKS) }))
	defer keys.Close()
	kinds := map[string]Demand{"": Authenticated(), "user": User(), "service": Service()}
	verdicts := map[string]int{}
	for _, c := range vectors.Cases {
		state := must(NewRevocationState(RevocationConfig{WhenUnknown: RefuseWhenUnknown}))
		for _, text := range c.Revocations {
			message := &authv1.WatchRevocationsResponse{}
			if err := protojson.Unmarshal(text, message); err != nil {
				t.Fatal(err)
			}
			state.Apply(message)
		}
		state.Apply(heartbeat(time.Now()))
		verifier := must(NewVerifier(VerifierConfig{
			Issuer: vectors.Issuer, Audience: vectors.Audience, JWKSURL: keys.URL, Revocations: state,
		}))
		demand := kinds[c.Demand.SubjectType]
		if c.Demand.Role != "" {
			demand = demand.WithRole(c.Demand.Role)
		}
		for _, time := range []string{"the first time", "again"} {
			caller, err := verifier.Authorize(t.Context(), []string{"Bearer " + c.Token}, demand)
			verdict := "ACCEPTED"
			if err != nil {
				verdict = ReasonOf(err)
			}
			if verdict != c.Verdict {
				t.Errorf("%s, %s: %s, and not %s", c.Name, time, verdict, c.Verdict)
				continue
			}
			if caller != nil {
				c.Caller.ExpireTime = caller.ExpireTime
				if !reflect.DeepEqual(caller, c.Caller) {
					t.Errorf("%s: %+v, and not %+v", c.Name, caller, c.Caller)
				}
			}
		}
		verdicts[c.Verdict]++
	}
	if t.Log(verdicts); verdicts["ACCEPTED"] < 10 || verdicts[ReasonTokenInvalid] < 50 {
		t.Error("these are too few vectors")
	}
}

func TestStageTokensOfEveryAlgorithmAreAccepted(t *testing.T) {
	var vectors struct {
		Algorithms []struct {
			Algorithm, Issuer, Audience, Token, Subject string
			JWKS                                        json.RawMessage
		}
	}
	if err := json.Unmarshal(must(os.ReadFile(variable(t, "POSTERN_VECTORS"))), &vectors); err != nil {
		t.Fatal(err)
	}
	if len(vectors.Algorithms) != 2 {
		t.Fatalf("%d algorithms besides ES256", len(vectors.Algorithms))
	}
	for _, one := range vectors.Algorithms {
		keys := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(one.JWKS) }))
		defer keys.Close()
		verifier := must(NewVerifier(VerifierConfig{Issuer: one.Issuer, Audience: one.Audience, JWKSURL: keys.URL}))
		caller, err := verifier.Verify(t.Context(), one.Token)
		if err != nil || caller.Subject != one.Subject {
			t.Errorf("%s: %+v, %v", one.Algorithm, caller, err)
		}
	}
}
