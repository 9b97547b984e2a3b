package postern

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"

	authv1 "github.com/postern-auth/postern/clients/go/postern/auth/v1"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// WhenUnknown is what happens to a valid token while it is unknown whether it was revoked.
type WhenUnknown int

// The choices. There is no default.
const (
	// RefuseWhenUnknown refuses every token with codes.Unavailable. Nobody who was logged out gets in; nobody else does
	// either.
	RefuseWhenUnknown WhenUnknown = iota + 1
	// AcceptWhenUnknown accepts a token as if it was not revoked, unless the state knows that it was.
	AcceptWhenUnknown
)

// RevocationConfig says how a [RevocationState] decides.
type RevocationConfig struct {
	WhenUnknown WhenUnknown // Required.
	// How old the last heartbeat may be before revocations count as unknown. Default: 30 s, as in Postern.
	MaxStaleness time.Duration
	// How many revocations are remembered. One that does not fit makes revocations unknown until it does not matter any
	// more. Default: 1,000,000, which take about 150 MB.
	MaxEntries int
	// Told when the stream of a [RevocationFeed] ends, and when it is complete again. Default: nobody.
	Logger *slog.Logger
	// Default: time.Now.
	Clock func() time.Time
}

// RevocationState remembers what was revoked. A [RevocationFeed] has one; tests can make their own and Apply messages
// to it.
type RevocationState struct {
	config    RevocationConfig
	completed chan struct{} // closed when it is complete the first time

	mu           sync.RWMutex
	ended        map[string]time.Time // ids of sessions, keys and tokens, until when each is remembered
	accounts     map[string]account   // by subject
	completeTime time.Time
	lostUntil    time.Time // until when something matters that did not fit
	purgeTime    time.Time
}

// account is what the tokens of a subject are good for now.
type account struct {
	roles    []string
	disabled bool
	until    time.Time
}

// NewRevocationState is empty, and not complete. It fails if config does not say what happens when revocations are
// unknown.
func NewRevocationState(config RevocationConfig) (*RevocationState, error) {
	if config.WhenUnknown != RefuseWhenUnknown && config.WhenUnknown != AcceptWhenUnknown {
		return nil, errors.New("postern: choose RefuseWhenUnknown or AcceptWhenUnknown")
	}
	if config.MaxStaleness <= 0 {
		config.MaxStaleness = 30 * time.Second
	}
	if config.MaxEntries <= 0 {
		config.MaxEntries = 1_000_000
	}
	if config.Logger == nil {
		config.Logger = slog.New(slog.DiscardHandler)
	}
	if config.Clock == nil {
		config.Clock = time.Now
	}
	return &RevocationState{
		config:    config,
		completed: make(chan struct{}),
		ended:     map[string]time.Time{},
		accounts:  map[string]account{},
	}, nil
}

// Apply takes the next message of the stream. To apply one twice changes nothing.
func (s *RevocationState) Apply(message *authv1.WatchRevocationsResponse) {
	now := s.config.Clock()
	s.purge(now)
	s.mu.Lock()
	defer s.mu.Unlock()
	until := rememberUntil(message.ForgetTime, now)
	switch event := message.Event.(type) {
	case *authv1.WatchRevocationsResponse_SessionEnded:
		remember(s, s.ended, event.SessionEnded.GetSessionId(), until, until)
	case *authv1.WatchRevocationsResponse_RolesChanged:
		changed := event.RolesChanged
		remember(s, s.accounts, changed.GetUserId(), account{slices.Clone(changed.GetRoles()), changed.GetDisabled(), until}, until)
	case *authv1.WatchRevocationsResponse_Heartbeat:
		s.completeTime = event.Heartbeat.GetCompleteTime().AsTime()
		if now.Before(s.completeTime) { // the clock of this machine is slow
			s.completeTime = now
		}
		if s.isComplete(now) {
			s.closeOnce()
		}
	}
}

func rememberUntil(forgetTime *timestamppb.Timestamp, now time.Time) time.Time {
	if forgetTime == nil {
		return now.Add(24 * time.Hour) // longer than tokens live
	}
	return forgetTime.AsTime().Add(leeway * time.Second)
}

func remember[V any](s *RevocationState, entries map[string]V, id string, entry V, until time.Time) {
	if _, isKnown := entries[id]; !isKnown && len(s.ended)+len(s.accounts) >= s.config.MaxEntries {
		if until.After(s.lostUntil) {
			s.lostUntil = until
		}
		return
	}
	entries[id] = entry
}

func (s *RevocationState) closeOnce() {
	select {
	case <-s.completed:
	default:
		close(s.completed)
	}
}

// purge forgets what does not matter any more, once a minute. Only the deletion keeps checks waiting, not the search.
func (s *RevocationState) purge(now time.Time) {
	if now.Sub(s.purgeTime).Abs() < time.Minute {
		return
	}
	var ended, accounts []string
	s.mu.RLock()
	for id, until := range s.ended {
		if !now.Before(until) {
			ended = append(ended, id)
		}
	}
	for id, account := range s.accounts {
		if !now.Before(account.until) {
			accounts = append(accounts, id)
		}
	}
	s.mu.RUnlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range ended {
		delete(s.ended, id)
	}
	for _, id := range accounts {
		delete(s.accounts, id)
	}
	s.purgeTime = now
}

// WaitComplete returns when all revocations up to now are known for the first time, or with the error of the context.
func (s *RevocationState) WaitComplete(ctx context.Context) error {
	select {
	case <-s.completed:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// RevocationStatus is what a [RevocationState] knows at a moment.
type RevocationStatus struct {
	Complete     bool      // whether all revocations are known that are older than MaxStaleness
	CompleteTime time.Time // all revocations before this time are known; zero before the first heartbeat
	Entries      int       // how many revocations are remembered
}

// Status is for health checks and metrics.
func (s *RevocationState) Status() RevocationStatus {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return RevocationStatus{s.isComplete(s.config.Clock()), s.completeTime, len(s.ended) + len(s.accounts)}
}

func (s *RevocationState) isComplete(now time.Time) bool {
	return now.Sub(s.completeTime) <= s.config.MaxStaleness && !now.Before(s.lostUntil)
}

// check refuses the caller of a revoked token, and replaces the roles of one whose roles have changed.
func (s *RevocationState) check(caller *Caller) error {
	now := s.config.Clock()
	s.mu.RLock()
	defer s.mu.RUnlock()
	if now.Before(s.ended[caller.SessionID]) || now.Before(s.ended[caller.TokenID]) {
		return errSessionRevoked
	}
	if account := s.accounts[caller.Subject]; now.Before(account.until) {
		if account.disabled {
			return errSessionRevoked
		}
		caller.Roles = append([]string{}, account.roles...)
	}
	if s.config.WhenUnknown == RefuseWhenUnknown && !s.isComplete(now) {
		return errUnknown
	}
	return nil
}
