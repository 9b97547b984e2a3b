package postern

import (
	"context"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	authv1 "github.com/postern-auth/postern/clients/go/postern/auth/v1"
)

const (
	// After this long without a message, of which one comes every five seconds, a stream is given up.
	longestSilence = 10 * time.Second
	// The pause before a stream is resumed, unless its end wants another one.
	resumePause = time.Second
	// The longest pause after errors that do not go away by themselves, such as those of a deleted key.
	longestResumePause = 30 * time.Second
)

// RevocationFeed follows the revocations of Postern until it is closed, and resumes the stream whenever it ends.
type RevocationFeed struct {
	state  *RevocationState
	conn   grpc.ClientConnInterface
	source *TokenSource
	cancel context.CancelFunc
	done   chan struct{}
	cursor string // of the last message that was applied

	mu  sync.Mutex
	err error
}

// StartRevocationFeed begins at once, in the background. The source is that of a service account. The connection leads
// to Postern; with the keepalive that the README shows, a connection that has died without a word is noticed.
func StartRevocationFeed(conn grpc.ClientConnInterface, source *TokenSource, config RevocationConfig) (*RevocationFeed, error) {
	state, err := NewRevocationState(config)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	feed := &RevocationFeed{state: state, conn: conn, source: source, cancel: cancel, done: make(chan struct{})}
	go feed.run(ctx)
	return feed, nil
}

// State is for [VerifierConfig], and tells whether the feed is complete.
func (f *RevocationFeed) State() *RevocationState { return f.state }

// Err is why the stream ended last. It is nil while the stream delivers messages.
func (f *RevocationFeed) Err() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

// WaitComplete returns when all revocations up to now are known for the first time. Before that, a service should not
// say that it is ready. If the context ends, the error tells also why there is no stream.
func (f *RevocationFeed) WaitComplete(ctx context.Context) error {
	err := f.state.WaitComplete(ctx)
	if reason := f.Err(); err != nil && reason != nil {
		return fmt.Errorf("%w; the stream of revocations: %w", err, reason)
	}
	return err
}

// Close ends the stream. What is known stays known, and grows stale.
func (f *RevocationFeed) Close() {
	f.cancel()
	<-f.done
}

func (f *RevocationFeed) run(ctx context.Context) {
	defer close(f.done)
	for failures := 0; ; {
		delivered, err := f.follow(ctx)
		if ctx.Err() != nil {
			return
		}
		if delivered {
			failures = 0
		}
		pause := resumeAfter(ErrorOf(err), failures)
		failures++
		f.note(err)
		f.state.config.Logger.Warn("the stream of revocations has ended", "error", err, "resumed_in", pause)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
		// gRPC would wait for up to two minutes before it connects again.
		if conn, ok := f.conn.(interface{ ResetConnectBackoff() }); ok {
			conn.ResetConnectBackoff()
		}
	}
}

// follow applies the messages of one stream until it ends, which is always with an error. It tells whether there were
// any.
func (f *RevocationFeed) follow(ctx context.Context) (delivered bool, err error) {
	token, err := f.source.Token(ctx)
	if err != nil {
		return false, err
	}
	streamCtx, cancel := context.WithCancel(withoutCallCredentials(ctx))
	defer cancel()
	silence := time.AfterFunc(longestSilence, cancel)
	defer silence.Stop()
	streamCtx = metadata.AppendToOutgoingContext(streamCtx, "authorization", "Bearer "+token)
	request := &authv1.WatchRevocationsRequest{ResumeCursor: f.cursor}
	stream, err := authv1.NewTokenServiceClient(f.conn).WatchRevocations(streamCtx, request)
	for err == nil {
		var message *authv1.WatchRevocationsResponse
		if message, err = stream.Recv(); err != nil {
			break
		}
		silence.Reset(longestSilence)
		f.state.Apply(message)
		f.cursor = message.Cursor
		if !delivered {
			delivered = true
			f.note(nil)
			f.state.config.Logger.Info("the stream of revocations delivers")
		}
	}
	if streamCtx.Err() != nil && ctx.Err() == nil {
		return delivered, &Error{Code: codes.Unavailable, Message: fmt.Sprintf("no message for %v", longestSilence)}
	}
	switch found := ErrorOf(err); {
	case found.Code == codes.Unauthenticated:
		f.source.Invalidate(token)
	case found.Code == codes.OutOfRange, found.Code == codes.InvalidArgument:
		f.cursor = ""
	}
	return delivered, err
}

// resumeAfter is the pause after this error, and after so many others without a message in between.
func resumeAfter(err *Error, failures int) time.Duration {
	goesOn := err.Reason == ReasonTokenExpired || err.Code == codes.OutOfRange
	switch {
	case goesOn && failures == 0:
		return 0
	case err.RetryDelay > 0:
		return withJitter(err.RetryDelay)
	case goesOn, err.Code == codes.Unavailable, err.Code == codes.DeadlineExceeded, err.Code == codes.Unknown:
		return withJitter(resumePause)
	}
	return withJitter(min(resumePause<<min(failures, 5), longestResumePause))
}

func (f *RevocationFeed) note(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
}
