package postern

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	authv1 "github.com/postern-auth/postern/clients/go/postern/auth/v1"
)

// fakePostern has one session, whose refresh tokens rotate as Postern's do, and one service account. Its tokens are "access N".
type fakePostern struct {
	mu       sync.Mutex
	lifetime time.Duration
	delay    time.Duration
	calls    map[string]int // by the last word of the method
	refusals []error        // of the next calls, which are not carried out
	lost     int            // how many of the next answers are lost, although the call was carried out
	issued   int
	session  int    // the number of the session; 0 if it has ended
	current  string // the refresh token that may be used
	used     string // the one before, which leads to the same new one until that is used
}

func newFakePostern() *fakePostern {
	return &fakePostern{lifetime: 15 * time.Minute, calls: map[string]int{}}
}

func (f *fakePostern) conn() fakeConn {
	return func(ctx context.Context, method string, request any) (proto.Message, error) {
		select {
		case <-time.After(f.delay):
		case <-ctx.Done():
			return nil, status.FromContextError(ctx.Err()).Err()
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		name := method[len(method)-5:]
		f.calls[name]++
		if len(f.refusals) > 0 {
			refusal := f.refusals[0]
			f.refusals = f.refusals[1:]
			return nil, refusal
		}
		answer, err := f.carryOut(request)
		if f.lost > 0 {
			f.lost--
			return nil, status.Error(codes.Unavailable, "the answer was lost")
		}
		return answer, err
	}
}

func (f *fakePostern) carryOut(request any) (proto.Message, error) {
	switch request := request.(type) {
	case *authv1.IssueServiceTokenRequest:
		f.issued++
		return &authv1.IssueServiceTokenResponse{
			AccessToken: fmt.Sprint("access ", f.issued), AccessTokenExpireTime: timestamppb.New(time.Now().Add(f.lifetime)),
		}, nil
	case *authv1.LoginRequest:
		f.session++
		f.current, f.used = fmt.Sprintf("refresh %d.0", f.session), ""
		return &authv1.LoginResponse{Tokens: f.pair()}, nil
	case *authv1.RefreshRequest:
		switch request.RefreshToken {
		case f.current:
			f.current, f.used = f.current+"+", f.current
		case f.used: // the answer was lost
		default:
			f.current, f.used = "ended", "ended"
			return nil, &Error{Code: codes.Unauthenticated, Reason: ReasonRefreshTokenInvalid}
		}
		return &authv1.RefreshResponse{Tokens: f.pair()}, nil
	}
	return nil, status.Error(codes.Unimplemented, "no such call")
}

func (f *fakePostern) pair() *authv1.TokenPair {
	f.issued++
	expireTime := timestamppb.New(time.Now().Add(f.lifetime))
	return &authv1.TokenPair{AccessToken: fmt.Sprint("access ", f.issued), AccessTokenExpireTime: expireTime, RefreshToken: f.current}
}

func (f *fakePostern) service() *TokenSource { return NewServiceTokenSource(f.conn(), "id", "secret") }

func wantToken(t *testing.T, source *TokenSource, want string) {
	t.Helper()
	token, err := source.Token(t.Context())
	if err != nil || token != want {
		t.Fatalf("the token is %q, not %q: %v", token, want, err)
	}
}

func TestManyCallersCauseOneRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := newFakePostern()
		server.delay = time.Second
		source := server.service()
		var group sync.WaitGroup
		for range 1000 {
			group.Go(func() { wantToken(t, source, "access 1") })
		}
		group.Wait()
		if server.issued != 1 {
			t.Fatalf("%d tokens were issued", server.issued)
		}
	})
}

func TestACallerThatGivesUpDoesNotEndTheRenewalOfTheOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := newFakePostern()
		server.delay = 2 * time.Second
		source := server.service()
		impatient, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		first := make(chan error)
		go func() {
			_, err := source.Token(impatient)
			first <- err
		}()
		synctest.Wait()
		wantToken(t, source, "access 1")
		if err := <-first; ErrorOf(err).Code != codes.DeadlineExceeded {
			t.Fatal(err)
		}
	})
}

func TestATokenIsRenewedAheadOfTime(t *testing.T) {
	for _, c := range []struct{ lifetime, ahead time.Duration }{
		{15 * time.Minute, time.Minute}, {100 * time.Second, 20 * time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			server := newFakePostern()
			server.lifetime = c.lifetime
			source := server.service()
			wantToken(t, source, "access 1")
			time.Sleep(c.lifetime - c.ahead - time.Millisecond)
			wantToken(t, source, "access 1")
			time.Sleep(time.Millisecond)
			wantToken(t, source, "access 1") // nobody waits for the renewal that this begins
			synctest.Wait()
			wantToken(t, source, "access 2")
		})
	}
}

func TestAFailingRenewalHandsOutTheOldTokenWhileThatIsValid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := newFakePostern()
		source := server.service()
		wantToken(t, source, "access 1")
		wrong := &Error{Code: codes.Unauthenticated, Reason: ReasonInvalidClient}
		server.refusals = []error{wrong, wrong}
		time.Sleep(14*time.Minute + 30*time.Second)
		wantToken(t, source, "access 1")
		synctest.Wait()
		wantToken(t, source, "access 1")
		time.Sleep(31 * time.Second)
		_, err := source.Token(t.Context())
		wantReason(t, err, ReasonInvalidClient)
		// The failure answers for a second, and then there is another attempt.
		_, err = source.Token(t.Context())
		wantReason(t, err, ReasonInvalidClient)
		if server.calls["Token"] != 3 {
			t.Fatalf("%d calls", server.calls["Token"])
		}
		time.Sleep(time.Second)
		wantToken(t, source, "access 2")
	})
}

func TestALostAnswerIsAskedForAgainWithTheSameRefreshToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := newFakePostern()
		store := NewMemoryStore("")
		source := NewLoginTokenSource(server.conn(), "ada@example.com", "a password", store)
		wantToken(t, source, "access 1")
		server.lost = 3
		time.Sleep(time.Hour)
		wantToken(t, source, "access 5")
		if server.calls["Login"] != 1 || server.calls["fresh"] != 4 || must(store.Load(t.Context())) != "refresh 1.0+" {
			t.Fatalf("%v, %v", server.calls, store)
		}
		time.Sleep(time.Hour)
		wantToken(t, source, "access 6")
	})
}

func TestASessionSurvivesPosternBeingAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := newFakePostern()
		source := NewRefreshTokenSource(server.conn(), NewMemoryStore("refresh 0"))
		server.current = "refresh 0"
		server.lost = 100
		start := time.Now()
		if _, err := source.Token(t.Context()); ErrorOf(err).Code != codes.Unavailable {
			t.Fatal(err)
		}
		if took := time.Since(start); took > renewalTimeout {
			t.Fatalf("it took %v", took)
		}
		server.lost = 0
		time.Sleep(time.Second)
		if _, err := source.Token(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
}

func TestARenewalWaitsAsLongAsTheAnswerSays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := newFakePostern()
		server.refusals = []error{&Error{Code: codes.ResourceExhausted, Reason: ReasonOverloaded, RetryDelay: 7 * time.Second}}
		start := time.Now()
		wantToken(t, server.service(), "access 1")
		if waited := time.Since(start); waited < 7*time.Second || waited > 11*time.Second {
			t.Fatalf("it waited for %v", waited)
		}
	})
}

func TestADelayThatIsTooLongIsToldAndKeptToByAllCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := newFakePostern()
		server.refusals = []error{&Error{Code: codes.ResourceExhausted, Reason: ReasonThrottled, RetryDelay: 5 * time.Minute}}
		source := server.service()
		for range 4 {
			_, err := source.Token(t.Context())
			wantReason(t, err, ReasonThrottled)
			time.Sleep(time.Minute)
		}
		if server.calls["Token"] != 1 {
			t.Fatalf("%d calls", server.calls["Token"])
		}
		time.Sleep(time.Minute)
		wantToken(t, source, "access 1")
	})
}

func TestAnEndedSessionIsToldWithoutAPassword(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := newFakePostern()
		store := NewMemoryStore("refresh 0")
		server.current = "refresh 0"
		source := NewRefreshTokenSource(server.conn(), store)
		wantToken(t, source, "access 1")
		server.current, server.used = "ended", "ended"
		time.Sleep(14*time.Minute + time.Second)
		wantToken(t, source, "access 1")
		synctest.Wait()
		for range 2 { // the access token has not expired, and is not handed out any more
			_, err := source.Token(t.Context())
			wantReason(t, err, ReasonRefreshTokenInvalid)
			time.Sleep(time.Second)
		}
		if must(store.Load(t.Context())) != "" {
			t.Fatal("the refresh token is still stored")
		}
	})
}

func TestAnEndedSessionWithAPasswordLogsInAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := newFakePostern()
		source := NewLoginTokenSource(server.conn(), "ada@example.com", "a password", NewMemoryStore("of another time"))
		wantToken(t, source, "access 1")
		if server.calls["Login"] != 1 || server.calls["fresh"] != 1 {
			t.Fatal(server.calls)
		}
	})
}

// slowStore fails sometimes, and looks whether the access token is out before the refresh token is in.
type slowStore struct {
	RefreshTokenStore
	failures int
}

func (s *slowStore) Save(ctx context.Context, refreshToken string) error {
	if s.failures > 0 {
		s.failures--
		return errors.New("disk full")
	}
	return s.RefreshTokenStore.Save(ctx, refreshToken)
}

func TestAnAccessTokenIsHandedOutOnlyWhenItsRefreshTokenIsStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := newFakePostern()
		server.current = "refresh 0"
		store := &slowStore{NewMemoryStore("refresh 0"), 1}
		source := NewRefreshTokenSource(server.conn(), store)
		if _, err := source.Token(t.Context()); err == nil || err.Error() != "disk full" {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		// The old refresh token leads to the same new one.
		wantToken(t, source, "access 2")
		if must(store.Load(t.Context())) != "refresh 0+" {
			t.Fatal("another refresh token is stored")
		}
	})
}

func TestAnInvalidatedTokenIsReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := newFakePostern().service()
		wantToken(t, source, "access 1")
		source.Invalidate("access 1")
		wantToken(t, source, "access 2")
		source.Invalidate("access 1")
		wantToken(t, source, "access 2")
	})
}

func TestCallCredentialsCarryTheTokenAndAskForTLSUnlessToldOtherwise(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := newFakePostern().service()
		metadata, err := source.Credentials().GetRequestMetadata(t.Context(), "https://shop.example.com")
		if err != nil || metadata["authorization"] != "Bearer access 1" {
			t.Fatal(metadata, err)
		}
		if !source.Credentials().RequireTransportSecurity() || source.PlaintextCredentials().RequireTransportSecurity() {
			t.Fatal("the wrong ones ask for TLS")
		}
		// A call that gets a token must not wait for one.
		metadata, err = source.Credentials().GetRequestMetadata(withoutCallCredentials(t.Context()))
		if err != nil || len(metadata) != 0 {
			t.Fatal(metadata, err)
		}
	})
}

func TestCallCredentialsFailWithTheStatusOfTheRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := newFakePostern()
		server.refusals = []error{&Error{Code: codes.Unauthenticated, Reason: ReasonInvalidClient}}
		_, err := server.service().Credentials().GetRequestMetadata(t.Context())
		wantReason(t, err, ReasonInvalidClient)
		if status.Code(err) != codes.Unauthenticated {
			t.Fatal(err)
		}
	})
}
