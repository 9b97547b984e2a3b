package postern

// Tests against a real server, which tests/libraries/stage starts. They fail without it.

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	authv1 "github.com/postern-auth/postern/clients/go/postern/auth/v1"
)

func variable(t testing.TB, name string) string {
	t.Helper()
	value := os.Getenv(name)
	if value == "" {
		t.Fatalf("%s is not set: run this with tests/libraries/stage", name)
	}
	return value
}

func connect(t testing.TB, name string, options ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	options = append(options, grpc.WithTransportCredentials(insecure.NewCredentials()))
	conn := must(grpc.NewClient(variable(t, name), options...))
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func tell(t testing.TB, path string, body any, answer any) {
	t.Helper()
	response, err := http.Post(variable(t, "POSTERN_STAGE")+path, "application/json", bytes.NewReader(must(json.Marshal(body))))
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		t.Fatal(path, response.Status)
	}
	if err := json.NewDecoder(response.Body).Decode(answer); err != nil {
		t.Fatal(err)
	}
}

// person is one who has signed up and logged in.
type person struct{ ID, Username, Email, Password, AccessToken, RefreshToken string }

func newPerson(t testing.TB, query string) (created person) {
	t.Helper()
	tell(t, "/accounts"+query, nil, &created)
	return created
}

func (p person) logOut(t testing.TB) {
	t.Helper()
	tell(t, "/logout", map[string]string{"refreshToken": p.RefreshToken}, &struct{}{})
}

func stageSource(t testing.TB) *TokenSource {
	t.Helper()
	return NewServiceTokenSource(connect(t, "POSTERN_GRPC_ADDR"), variable(t, "POSTERN_CLIENT_ID"), variable(t, "POSTERN_CLIENT_SECRET"))
}

// startFeed follows the revocations through the proxy that can be cut, and waits until they are complete.
func startFeed(t testing.TB, choice WhenUnknown, staleness time.Duration) (*RevocationFeed, *Verifier) {
	t.Helper()
	config := RevocationConfig{WhenUnknown: choice, MaxStaleness: staleness}
	feed := must(StartRevocationFeed(connect(t, "POSTERN_FEED_ADDR"), stageSource(t), config))
	t.Cleanup(feed.Close)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := feed.WaitComplete(ctx); err != nil {
		t.Fatal(err)
	}
	return feed, stageVerifier(t, VerifierConfig{Revocations: feed.State()})
}

func stageVerifier(t testing.TB, config VerifierConfig) *Verifier {
	t.Helper()
	config.Issuer, config.Audience = variable(t, "POSTERN_ISSUER"), variable(t, "POSTERN_AUDIENCE")
	return must(NewVerifier(config))
}

func TestStageATokenOfAnOldKeyIsAcceptedAfterARotation(t *testing.T) {
	verifier, source := stageVerifier(t, VerifierConfig{KeyCooldown: time.Second}), stageSource(t)
	old := must(source.Token(t.Context()))
	caller := must(verifier.Verify(t.Context(), old))
	if caller.SubjectType != SubjectService || caller.Subject != variable(t, "POSTERN_CLIENT_ID") || caller.ClientID != caller.Subject {
		t.Fatalf("%+v", caller)
	}
	var rotated struct{ Kid string }
	tell(t, "/keys/rotate", nil, &rotated)
	source.Invalidate(old)
	for _, token := range []string{must(source.Token(t.Context())), old} {
		must(verifier.Verify(t.Context(), token))
	}
	if readToken(must(source.Token(t.Context()))).kid != rotated.Kid || readToken(old).kid == rotated.Kid {
		t.Fatal("the keys were not rotated")
	}
}

func TestStageAPersonWhoLoggedOutIsRefusedWithinASecond(t *testing.T) {
	_, verifier := startFeed(t, RefuseWhenUnknown, 0)
	for range 3 {
		person := newPerson(t, "")
		caller := must(verifier.Verify(t.Context(), person.AccessToken))
		if caller.Subject != person.ID || caller.Email != person.Email || caller.Username != person.Username || !caller.HasRole("user") {
			t.Fatalf("%+v", caller)
		}
		person.logOut(t)
		eventually(t, time.Second, "the token is refused", func() bool {
			_, err := verifier.Verify(t.Context(), person.AccessToken)
			return ReasonOf(err) == ReasonSessionRevoked
		})
	}
}

func TestStageADisabledPersonIsRefusedWithinASecond(t *testing.T) {
	_, verifier := startFeed(t, AcceptWhenUnknown, 0)
	person := newPerson(t, "?role=admin")
	if caller := must(verifier.Verify(t.Context(), person.AccessToken)); !caller.HasRole("admin") {
		t.Fatal(caller)
	}
	tell(t, "/disable?id="+url.QueryEscape(person.ID), nil, &struct{}{})
	eventually(t, time.Second, "the token is refused", func() bool {
		_, err := verifier.Verify(t.Context(), person.AccessToken)
		return ReasonOf(err) == ReasonSessionRevoked
	})
}

func TestStageWhenTheFeedIsCutTheChosenThingHappensUntilItIsRestored(t *testing.T) {
	const staleness = 6 * time.Second
	refusing, refuse := startFeed(t, RefuseWhenUnknown, staleness)
	_, accept := startFeed(t, AcceptWhenUnknown, staleness)
	bystander, leaver := newPerson(t, ""), newPerson(t, "")
	for _, verifier := range []*Verifier{refuse, accept} {
		must(verifier.Verify(t.Context(), bystander.AccessToken))
		must(verifier.Verify(t.Context(), leaver.AccessToken))
	}

	tell(t, "/feed/cut", nil, &struct{}{})
	defer tell(t, "/feed/restore", nil, &struct{}{})
	leaver.logOut(t)
	eventually(t, staleness+2*time.Second, "it is known that revocations are unknown", func() bool {
		_, err := refuse.Verify(t.Context(), bystander.AccessToken)
		return ErrorOf(err) != nil && ErrorOf(err).Code == codes.Unavailable
	})
	if state := refusing.State().Status(); state.Complete || refusing.Err() == nil {
		t.Fatalf("%+v, %v", state, refusing.Err())
	}
	must(accept.Verify(t.Context(), bystander.AccessToken))
	must(accept.Verify(t.Context(), leaver.AccessToken)) // nobody knows
	time.Sleep(3 * time.Second)                          // so that connecting has failed a few times

	tell(t, "/feed/restore", nil, &struct{}{})
	for _, verifier := range []*Verifier{refuse, accept} {
		eventually(t, 3*time.Second, "what happened meanwhile is known", func() bool {
			_, err := verifier.Verify(t.Context(), leaver.AccessToken)
			return ReasonOf(err) == ReasonSessionRevoked
		})
		eventually(t, time.Second, "the others get in again", func() bool {
			_, err := verifier.Verify(t.Context(), bystander.AccessToken)
			return err == nil
		})
	}
}

func TestStageAFeedTellsThatItsServiceIsDisabled(t *testing.T) {
	var service struct{ ClientID, ClientSecret string }
	tell(t, "/services", nil, &service)
	conn := connect(t, "POSTERN_GRPC_ADDR")
	source := NewServiceTokenSource(conn, service.ClientID, service.ClientSecret)
	feed := must(StartRevocationFeed(conn, source, RevocationConfig{WhenUnknown: RefuseWhenUnknown}))
	defer feed.Close()
	if err := feed.WaitComplete(t.Context()); err != nil {
		t.Fatal(err)
	}
	tell(t, "/disable?id="+url.QueryEscape(service.ClientID), nil, &struct{}{})
	eventually(t, 10*time.Second, "the stream ends, and there is no other one", func() bool {
		return ReasonOf(feed.Err()) == ReasonInvalidClient
	})
}

func TestStageALoginSurvivesLostAnswers(t *testing.T) {
	person := newPerson(t, "")
	var lose atomic.Int64
	var sent []string
	losing := func(ctx context.Context, method string, request, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, options ...grpc.CallOption) error {
		if refresh, ok := request.(*authv1.RefreshRequest); ok {
			sent = append(sent, refresh.RefreshToken)
		}
		err := invoke(ctx, method, request, reply, conn, options...)
		if err == nil && lose.Add(-1) >= 0 {
			return status.Error(codes.Unavailable, "the answer was lost")
		}
		return err
	}
	store := NewMemoryStore(person.RefreshToken)
	source := NewRefreshTokenSource(connect(t, "POSTERN_GRPC_ADDR", grpc.WithUnaryInterceptor(losing)), store)
	for round := range 3 {
		before := must(store.Load(t.Context()))
		sent = nil
		lose.Store(2)
		token := must(source.Token(t.Context()))
		if len(sent) != 3 || sent[0] != before || sent[1] != before || sent[2] != before {
			t.Fatal("not the same refresh token")
		}
		if must(store.Load(t.Context())) == before {
			t.Fatal("the refresh token was not replaced")
		}
		ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+token)
		answer, err := authv1.NewAuthServiceClient(connect(t, "POSTERN_GRPC_ADDR")).GetMe(ctx, &authv1.GetMeRequest{})
		if err != nil || answer.User.Id != person.ID {
			t.Fatal("round", round, err)
		}
		source.Invalidate(token)
	}
}

func TestStageAPasswordLogsInAgainWhenTheSessionHasEnded(t *testing.T) {
	person := newPerson(t, "")
	conn := connect(t, "POSTERN_GRPC_ADDR")
	with := NewLoginTokenSource(conn, person.Email, person.Password, NewMemoryStore(person.RefreshToken))
	without := NewRefreshTokenSource(conn, NewMemoryStore(person.RefreshToken))
	person.logOut(t)
	_, err := without.Token(t.Context())
	wantReason(t, err, ReasonRefreshTokenInvalid)
	caller := must(stageVerifier(t, VerifierConfig{}).Verify(t.Context(), must(with.Token(t.Context()))))
	if caller.Subject != person.ID {
		t.Fatal(caller)
	}
	_, err = NewLoginTokenSource(conn, person.Email, "not the password", nil).Token(t.Context())
	wantReason(t, err, ReasonInvalidCredentials)
}

// One connection for all: the calls that get its tokens go without credentials, and the feed has no second ones.
func TestStageAConnectionCanHaveTheCredentialsOfASourceThatUsesIt(t *testing.T) {
	var source *TokenSource
	lazily := lazyCredentials{&source}
	conn := connect(t, "POSTERN_GRPC_ADDR", grpc.WithPerRPCCredentials(lazily))
	source = NewServiceTokenSource(conn, variable(t, "POSTERN_CLIENT_ID"), variable(t, "POSTERN_CLIENT_SECRET"))
	_, err := authv1.NewAuthServiceClient(conn).GetMe(t.Context(), &authv1.GetMeRequest{})
	wantReason(t, err, ReasonUserRequired)
	feed := must(StartRevocationFeed(conn, source, RevocationConfig{WhenUnknown: RefuseWhenUnknown}))
	defer feed.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := feed.WaitComplete(ctx); err != nil {
		t.Fatal(err)
	}
}

type lazyCredentials struct{ source **TokenSource }

func (c lazyCredentials) GetRequestMetadata(ctx context.Context, uri ...string) (map[string]string, error) {
	return (*c.source).PlaintextCredentials().GetRequestMetadata(ctx, uri...)
}

func (c lazyCredentials) RequireTransportSecurity() bool { return false }

func TestStageTheErrorsOfTheServerAreRead(t *testing.T) {
	client := authv1.NewAuthServiceClient(connect(t, "POSTERN_GRPC_ADDR"))
	_, err := client.SignUp(t.Context(), &authv1.SignUpRequest{Username: "-", Email: "nowhere", Password: "short"})
	found := ErrorOf(fmt.Errorf("signing up: %w", err))
	fields := map[string]bool{}
	for _, violation := range found.Violations {
		fields[violation.Field] = violation.Description != ""
	}
	if found.Code != codes.InvalidArgument || found.Reason != ReasonInvalidField || !fields["username"] || !fields["email"] || !fields["password"] {
		t.Fatalf("%+v", found)
	}
	_, err = client.GetMe(t.Context(), &authv1.GetMeRequest{})
	wantReason(t, err, ReasonTokenMissing)
}
