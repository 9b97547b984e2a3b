package postern

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"

	authv1 "github.com/postern-auth/postern/clients/go/postern/auth/v1"
)

func heartbeat(completeTime time.Time) *authv1.WatchRevocationsResponse {
	return &authv1.WatchRevocationsResponse{Event: &authv1.WatchRevocationsResponse_Heartbeat{
		Heartbeat: &authv1.Heartbeat{CompleteTime: timestamppb.New(completeTime)},
	}}
}

func ended(id string, forgetTime time.Time) *authv1.WatchRevocationsResponse {
	return &authv1.WatchRevocationsResponse{ForgetTime: timestamppb.New(forgetTime), Event: &authv1.WatchRevocationsResponse_SessionEnded{
		SessionEnded: &authv1.SessionEnded{SessionId: id},
	}}
}

func changed(id string, disabled bool, forgetTime time.Time, roles ...string) *authv1.WatchRevocationsResponse {
	return &authv1.WatchRevocationsResponse{ForgetTime: timestamppb.New(forgetTime), Event: &authv1.WatchRevocationsResponse_RolesChanged{
		RolesChanged: &authv1.RolesChanged{UserId: id, Disabled: disabled, Roles: roles},
	}}
}

func newState(t testing.TB, config RevocationConfig) (*RevocationState, *clock) {
	clock := newClock()
	config.Clock = clock.now
	if config.WhenUnknown == 0 {
		config.WhenUnknown = RefuseWhenUnknown
	}
	state, err := NewRevocationState(config)
	if err != nil {
		t.Fatal(err)
	}
	return state, clock
}

func someone() *Caller {
	return &Caller{Subject: "user-1", SessionID: "session-1", TokenID: "token-1", Roles: []string{"user"}}
}

func TestTheChoiceHasNoDefault(t *testing.T) {
	for _, choice := range []WhenUnknown{0, 3, -1} {
		if _, err := NewRevocationState(RevocationConfig{WhenUnknown: choice}); err == nil {
			t.Errorf("%d is accepted", choice)
		}
		if _, err := StartRevocationFeed(nil, nil, RevocationConfig{WhenUnknown: choice}); err == nil {
			t.Errorf("%d is accepted", choice)
		}
	}
}

func TestBeforeTheFirstHeartbeatTheChosenThingHappens(t *testing.T) {
	refuse, clock := newState(t, RevocationConfig{})
	err := refuse.check(someone())
	wantReason(t, err, ReasonStoreUnavailable)
	if found := ErrorOf(err); found.Code != codes.Unavailable || found.Message != "revocations unknown" {
		t.Fatal(found)
	}
	accept, _ := newState(t, RevocationConfig{WhenUnknown: AcceptWhenUnknown})
	if err := accept.check(someone()); err != nil {
		t.Fatal(err)
	}
	accept.Apply(ended("session-1", clock.now().Add(time.Hour)))
	wantReason(t, accept.check(someone()), ReasonSessionRevoked)
}

func TestAnOldHeartbeatMakesRevocationsUnknown(t *testing.T) {
	for _, staleness := range []time.Duration{0, 2 * time.Second} {
		state, clock := newState(t, RevocationConfig{MaxStaleness: staleness})
		if staleness == 0 {
			staleness = 30 * time.Second
		}
		state.Apply(heartbeat(clock.now()))
		clock.advance(staleness)
		if err := state.check(someone()); err != nil || !state.Status().Complete {
			t.Fatal(err)
		}
		clock.advance(time.Millisecond)
		wantReason(t, state.check(someone()), ReasonStoreUnavailable)
		// While Postern cannot read its database, heartbeats come with the old time.
		state.Apply(heartbeat(clock.now().Add(-staleness - time.Second)))
		wantReason(t, state.check(someone()), ReasonStoreUnavailable)
		state.Apply(heartbeat(clock.now().Add(-staleness)))
		if err := state.check(someone()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAHeartbeatFromTheFutureCountsAsOneOfNow(t *testing.T) {
	state, clock := newState(t, RevocationConfig{})
	state.Apply(heartbeat(clock.now().Add(time.Hour)))
	clock.advance(30*time.Second + time.Millisecond)
	wantReason(t, state.check(someone()), ReasonStoreUnavailable)
}

func TestAnEndedSessionIsRefusedByItsIdOrThatOfTheTokenUntilItIsForgotten(t *testing.T) {
	for _, id := range []string{"session-1", "token-1"} {
		state, clock := newState(t, RevocationConfig{})
		state.Apply(ended(id, clock.now().Add(20*time.Second)))
		state.Apply(heartbeat(clock.now()))
		wantReason(t, state.check(someone()), ReasonSessionRevoked)
		if err := state.check(&Caller{SessionID: "session-2", TokenID: "token-2"}); err != nil {
			t.Fatal(err)
		}
		clock.advance(25*time.Second - time.Millisecond)
		wantReason(t, state.check(someone()), ReasonSessionRevoked)
		clock.advance(time.Millisecond)
		if err := state.check(someone()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestALaterMessageAboutAnAccountReplacesTheEarlierOne(t *testing.T) {
	state, clock := newState(t, RevocationConfig{})
	state.Apply(heartbeat(clock.now()))
	forget := clock.now().Add(20 * time.Second)
	for _, c := range []struct {
		disabled bool
		roles    []string
	}{{false, []string{"user", "admin"}}, {true, nil}, {false, []string{"user"}}, {false, nil}} {
		state.Apply(changed("user-1", c.disabled, forget, c.roles...))
		caller := someone()
		if err := state.check(caller); (err != nil) != c.disabled {
			t.Fatal(err)
		}
		if !c.disabled && !slices.Equal(caller.Roles, c.roles) {
			t.Fatal(caller.Roles)
		}
	}
	clock.advance(25 * time.Second)
	caller := someone()
	if err := state.check(caller); err != nil || !caller.HasRole("user") {
		t.Fatal(err, caller.Roles)
	}
}

func TestWhatDoesNotMatterAnyMoreIsForgotten(t *testing.T) {
	state, clock := newState(t, RevocationConfig{})
	for i := range 100 {
		state.Apply(ended(fmt.Sprint(i), clock.now().Add(time.Minute)))
		state.Apply(changed(fmt.Sprint(i), true, clock.now().Add(time.Minute)))
	}
	state.Apply(&authv1.WatchRevocationsResponse{Event: ended("without an end", clock.now()).Event})
	if entries := state.Status().Entries; entries != 201 {
		t.Fatal(entries)
	}
	clock.advance(65 * time.Second)
	state.Apply(heartbeat(clock.now()))
	if entries := state.Status().Entries; entries != 1 {
		t.Fatal(entries)
	}
}

func TestARevocationThatDoesNotFitMakesRevocationsUnknownUntilItDoesNotMatter(t *testing.T) {
	state, clock := newState(t, RevocationConfig{MaxEntries: 2})
	state.Apply(ended("session-2", clock.now().Add(time.Hour)))
	state.Apply(changed("user-2", true, clock.now().Add(time.Hour)))
	state.Apply(changed("user-2", false, clock.now().Add(time.Hour)))
	state.Apply(heartbeat(clock.now()))
	if err := state.check(someone()); err != nil {
		t.Fatal(err)
	}
	state.Apply(ended("session-1", clock.now().Add(10*time.Second)))
	wantReason(t, state.check(someone()), ReasonStoreUnavailable)
	clock.advance(15 * time.Second)
	if err := state.check(someone()); err != nil || state.Status().Entries != 2 {
		t.Fatal(err)
	}
}

func TestWaitCompleteReturnsAtTheFirstFreshHeartbeat(t *testing.T) {
	state, clock := newState(t, RevocationConfig{})
	soon, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	state.Apply(heartbeat(clock.now().Add(-time.Hour)))
	if state.WaitComplete(soon) == nil {
		t.Fatal("an old heartbeat completes it")
	}
	state.Apply(heartbeat(clock.now()))
	state.Apply(heartbeat(clock.now()))
	if err := state.WaitComplete(t.Context()); err != nil {
		t.Fatal(err)
	}
}
