package postern

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	// How long one call that gets a token may take. Postern itself gives up after this time.
	attemptTimeout = 10 * time.Second
	// How long a renewal goes on, and how often it asks, before its callers are told that it failed.
	renewalTimeout, renewalAttempts = 30 * time.Second, 6
	// The longest pause between two attempts, unless the answer wants a longer one.
	longestPause = 5 * time.Second
	// How long a failed renewal answers for those that would follow it at once.
	failurePause = time.Second
)

// TokenSource has an access token for outgoing calls, and renews it ahead of time: when a fifth of its lifetime is
// left, but at most a minute. There is one renewal at a time, however many callers wait for it, and a caller that gives
// up does not end it. While the old token is valid, callers get that one and do not wait.
//
// A renewal whose answer was lost asks again, with the same refresh token. Nothing runs while nobody asks for a token.
type TokenSource struct {
	obtain func(context.Context) (grant, error)

	mu      sync.Mutex
	current grant
	renewal *renewal // in flight, or nil
	// After a renewal that failed: its error, and the time before which there is no other.
	failure   error
	retryTime time.Time
}

// grant is a token that was issued.
type grant struct {
	token                 string
	renewTime, expireTime time.Time
}

type renewal struct {
	done  chan struct{}
	token string
	err   error
}

// Token returns an access token that is valid at this moment, as far as the clock of this machine tells.
//
// It fails if a token cannot be had: [ReasonInvalidClient] and [ReasonInvalidCredentials] if the credentials are wrong,
// [ReasonRefreshTokenInvalid] if the session has ended and there is no password, codes.Unavailable and others if
// Postern does not answer for half a minute, codes.Canceled and codes.DeadlineExceeded if the context ends, and the
// error of the store.
func (s *TokenSource) Token(ctx context.Context) (string, error) {
	token, renewal, err := s.tokenOrRenewal()
	if renewal == nil {
		return token, err
	}
	select {
	case <-renewal.done:
		return renewal.token, renewal.err
	case <-ctx.Done():
		return "", ErrorOf(ctx.Err())
	}
}

// Invalidate says that this access token was refused with [ReasonTokenExpired] although [TokenSource.Token] returned
// it: the clock of this machine is slow. The next call of Token gets another one. It does nothing if there is another
// one already.
func (s *TokenSource) Invalidate(token string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.current.token == token {
		s.current = grant{}
	}
}

// String hides the token, so that logs do not have it.
func (s *TokenSource) String() string { return "postern.TokenSource" }

func (s *TokenSource) tokenOrRenewal() (string, *renewal, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if now.Before(s.current.renewTime) {
		return s.current.token, nil, nil
	}
	if s.renewal == nil && !now.Before(s.retryTime) {
		s.renewal = &renewal{done: make(chan struct{})}
		go s.renew(s.renewal)
	}
	switch {
	case now.Before(s.current.expireTime):
		return s.current.token, nil, nil
	case s.renewal == nil:
		return "", nil, s.failure
	}
	return "", s.renewal, nil
}

func (s *TokenSource) renew(renewal *renewal) {
	granted, err := s.obtainPatiently()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		s.current = granted
	} else {
		s.failure, s.retryTime = err, time.Now().Add(max(ErrorOf(err).RetryDelay, failurePause))
	}
	if ReasonOf(err) == ReasonRefreshTokenInvalid {
		s.current = grant{} // the session has ended, and its access token with it
	}
	renewal.token, renewal.err = granted.token, err
	s.renewal = nil
	close(renewal.done)
}

// obtainPatiently asks until there is an answer, which can be a refusal. The context of no caller ends it.
func (s *TokenSource) obtainPatiently() (grant, error) {
	ctx, cancel := context.WithTimeout(withoutCallCredentials(context.Background()), renewalTimeout)
	defer cancel()
	for attempt := 1; ; attempt++ {
		limited, cancelAttempt := context.WithTimeout(ctx, attemptTimeout)
		granted, err := s.obtain(limited)
		cancelAttempt()
		if err == nil || attempt == renewalAttempts || !isTransient(ErrorOf(err)) {
			return granted, err
		}
		doubling := min(100*time.Millisecond<<attempt, longestPause)
		pause := withJitter(max(doubling/2, ErrorOf(err).RetryDelay))
		if deadline, _ := ctx.Deadline(); time.Until(deadline) < pause {
			return grant{}, err
		}
		time.Sleep(pause)
	}
}

// isTransient tells whether asking again can succeed: the answer was lost, or says when to ask again.
func isTransient(err *Error) bool {
	switch err.Code {
	case codes.Unavailable, codes.DeadlineExceeded:
		return true
	default:
		return err.RetryDelay > 0
	}
}

// withJitter is a random time from this pause to one and a half times as long.
func withJitter(pause time.Duration) time.Duration {
	return pause + rand.N(pause/2+1)
}

func newGrant(token string, expireTime *timestamppb.Timestamp) grant {
	expires, now := expireTime.AsTime(), time.Now()
	ahead := min(expires.Sub(now)/5, time.Minute)
	return grant{token, expires.Add(-ahead), expires}
}
