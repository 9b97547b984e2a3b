package postern

import (
	"context"
	"sync"
)

// RefreshTokenStore keeps the refresh token of one session, such as in a file or in the keychain of the system. Two
// processes must not share a session: the refresh token that one of them has used ends the session when the other one
// uses it.
type RefreshTokenStore interface {
	// Load returns the refresh token, or "" if there is none.
	Load(ctx context.Context) (string, error)
	// Save keeps this refresh token in the place of the last one, which is used up, and returns when it is stored. "" means
	// that the session has ended.
	Save(ctx context.Context, refreshToken string) error
}

// NewMemoryStore keeps the refresh token as long as the process lives, beginning with this one, which may be "".
func NewMemoryStore(refreshToken string) RefreshTokenStore {
	return &memoryStore{token: refreshToken}
}

type memoryStore struct {
	mu    sync.Mutex
	token string
}

func (s *memoryStore) Load(context.Context) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.token, nil
}

func (s *memoryStore) Save(_ context.Context, refreshToken string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.token = refreshToken
	return nil
}
