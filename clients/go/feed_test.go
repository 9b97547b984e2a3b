package postern

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	authv1 "github.com/postern-auth/postern/clients/go/postern/auth/v1"
)

// fakeFeed is a Postern whose streams the test plays: each sends its messages, and ends with its error or stays silent.
type fakeFeed struct {
	fakeConn
	mu     sync.Mutex
	plays  []play
	opened []opened
}

type play struct {
	messages []*authv1.WatchRevocationsResponse
	err      error // nil: silent until the client ends it
	every    time.Duration
}

type opened struct {
	cursor, authorization string
	time                  time.Time
}

func (f *fakeFeed) NewStream(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	stream := &fakeStream{feed: f, ctx: ctx}
	if len(f.plays) > 0 {
		stream.play, f.plays = f.plays[0], f.plays[1:]
	}
	return stream, nil
}

func (f *fakeFeed) openings() []opened {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.opened)
}

type fakeStream struct {
	grpc.ClientStream
	feed *fakeFeed
	ctx  context.Context
	play
}

func (s *fakeStream) SendMsg(request any) error {
	sent, _ := metadata.FromOutgoingContext(s.ctx)
	authorization := strings.Join(sent.Get("authorization"), " and ")
	s.feed.mu.Lock()
	defer s.feed.mu.Unlock()
	s.feed.opened = append(s.feed.opened, opened{request.(*authv1.WatchRevocationsRequest).ResumeCursor, authorization, time.Now()})
	return nil
}

func (s *fakeStream) CloseSend() error { return nil }

func (s *fakeStream) RecvMsg(message any) error {
	if len(s.messages) > 0 {
		select {
		case <-time.After(s.every):
		case <-s.ctx.Done():
			return status.FromContextError(s.ctx.Err()).Err()
		}
		proto.Merge(message.(proto.Message), s.messages[0])
		s.messages = s.messages[1:]
		return nil
	}
	if s.err != nil {
		return s.err
	}
	<-s.ctx.Done()
	return status.FromContextError(s.ctx.Err()).Err()
}

func at(cursor string, message *authv1.WatchRevocationsResponse) *authv1.WatchRevocationsResponse {
	message.Cursor = cursor
	return message
}

// follow plays these streams to a feed for a while, and returns when and how it opened each.
func follow(t *testing.T, while time.Duration, plays ...play) (*RevocationFeed, []opened) {
	server := newFakePostern()
	conn := &fakeFeed{fakeConn: server.conn(), plays: plays}
	feed := must(StartRevocationFeed(conn, NewServiceTokenSource(conn, "id", "secret"), RevocationConfig{WhenUnknown: RefuseWhenUnknown}))
	t.Cleanup(feed.Close)
	time.Sleep(while)
	return feed, conn.openings()
}

func TestAFeedAppliesWhatComesAndResumesAfterTheLastMessage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		later := time.Now().Add(time.Hour)
		feed, opened := follow(t, 3*time.Second,
			play{[]*authv1.WatchRevocationsResponse{at("1", ended("session-1", later)), at("2", heartbeat(time.Now()))}, status.Error(codes.Unavailable, "the connection ends"), 0},
			play{[]*authv1.WatchRevocationsResponse{at("3", changed("user-2", true, later))}, nil, 0})
		if err := feed.WaitComplete(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantReason(t, feed.State().check(someone()), ReasonSessionRevoked)
		wantReason(t, feed.State().check(&Caller{Subject: "user-2"}), ReasonSessionRevoked)
		if len(opened) != 2 || opened[0].cursor != "" || opened[1].cursor != "2" || opened[1].authorization != "Bearer access 1" {
			t.Fatal(opened)
		}
		if pause := opened[1].time.Sub(opened[0].time); pause < time.Second || pause > 2*time.Second {
			t.Fatal(pause)
		}
		if feed.Err() != nil {
			t.Fatal(feed.Err())
		}
	})
}

func TestHowAFeedGoesOnAfterEachEnd(t *testing.T) {
	unauthenticated := func(reason string) error { return &Error{Code: codes.Unauthenticated, Reason: reason} }
	for _, c := range []struct {
		name               string
		err                error
		atLeast, atMost    time.Duration
		cursor, credential string
	}{
		{"unavailable", status.Error(codes.Unavailable, "gone"), time.Second, 1500 * time.Millisecond, "1", "Bearer access 1"},
		{"the delay of Postern", &Error{Code: codes.Unavailable, RetryDelay: 100 * time.Millisecond}, 100 * time.Millisecond, 150 * time.Millisecond, "1", "Bearer access 1"},
		{"overloaded", &Error{Code: codes.ResourceExhausted, Reason: ReasonOverloaded, RetryDelay: 4 * time.Second}, 4 * time.Second, 6 * time.Second, "1", "Bearer access 1"},
		{"the end of the file", io.EOF, time.Second, 1500 * time.Millisecond, "1", "Bearer access 1"},
		{"expired", unauthenticated(ReasonTokenExpired), 0, 0, "1", "Bearer access 2"},
		{"revoked", unauthenticated(ReasonSessionRevoked), time.Second, 1500 * time.Millisecond, "1", "Bearer access 2"},
		{"the cursor", &Error{Code: codes.OutOfRange, Reason: ReasonCursorExpired}, 0, 0, "", "Bearer access 1"},
		{"no cursor", &Error{Code: codes.InvalidArgument, Reason: ReasonInvalidField}, time.Second, 1500 * time.Millisecond, "", "Bearer access 1"},
	} {
		synctest.Test(t, func(t *testing.T) {
			ended := ended("session-1", time.Now().Add(time.Hour))
			feed, opened := follow(t, 8*time.Second, play{[]*authv1.WatchRevocationsResponse{at("1", ended)}, c.err, 0})
			if len(opened) != 2 {
				t.Fatal(c.name, opened)
			}
			pause := opened[1].time.Sub(opened[0].time)
			if pause < c.atLeast || pause > c.atMost || opened[1].cursor != c.cursor || opened[1].authorization != c.credential {
				t.Errorf("%s: after %v %+v", c.name, pause, opened[1])
			}
			wantReason(t, feed.State().check(someone()), ReasonSessionRevoked) // what is remembered is kept
		})
	}
}

func TestAFeedDoesNotHurryAfterTheSameErrorAgainAndAgain(t *testing.T) {
	for _, c := range []struct {
		err             error
		atLeast, atMost int
		messages        []*authv1.WatchRevocationsResponse
	}{
		{&Error{Code: codes.Unauthenticated, Reason: ReasonTokenExpired}, 40, 61, nil},
		{&Error{Code: codes.OutOfRange, Reason: ReasonCursorExpired}, 40, 61, nil},
		{&Error{Code: codes.Unauthenticated, Reason: ReasonSessionRevoked}, 5, 7, nil},
		{&Error{Code: codes.Unauthenticated, Reason: ReasonSessionRevoked}, 40, 61, []*authv1.WatchRevocationsResponse{heartbeat(time.Now())}},
	} {
		err := c.err
		synctest.Test(t, func(t *testing.T) {
			feed, opened := follow(t, time.Minute, slices.Repeat([]play{{c.messages, err, 0}}, 100)...)
			if len(opened) > c.atMost || len(opened) < c.atLeast {
				t.Error(err, len(opened))
			}
			if ReasonOf(feed.Err()) != ReasonOf(err) {
				t.Error(feed.Err())
			}
		})
	}
}

func TestASilentStreamIsGivenUpAfterTenSeconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		feed, opened := follow(t, 11500*time.Millisecond, play{[]*authv1.WatchRevocationsResponse{at("1", heartbeat(time.Now()))}, nil, 0})
		if len(opened) != 2 || opened[1].cursor != "1" {
			t.Fatal(opened)
		}
		if pause := opened[1].time.Sub(opened[0].time); pause < 11*time.Second {
			t.Fatal(pause)
		}
		if err := feed.Err(); ErrorOf(err).Code != codes.Unavailable || !strings.Contains(err.Error(), "no message for 10s") {
			t.Fatal(err)
		}
	})
}

func TestAStreamThatNeverSaysAnythingIsGivenUpTooAndOneThatSpeaksIsNot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		messages := slices.Repeat([]*authv1.WatchRevocationsResponse{at("1", heartbeat(time.Now()))}, 10)
		_, opened := follow(t, 50*time.Second, play{}, play{messages, nil, 5 * time.Second})
		if len(opened) != 2 {
			t.Fatal(opened)
		}
	})
}

func TestWaitCompleteTellsWhyThereIsNoStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		feed, _ := follow(t, time.Second, play{err: &Error{Code: codes.PermissionDenied, Reason: ReasonServiceRequired}})
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		err := feed.WaitComplete(ctx)
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), ReasonServiceRequired) {
			t.Fatal(err)
		}
	})
}

func TestAClosedFeedOpensNoMoreStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		feed, _ := follow(t, time.Second)
		feed.Close()
		feed.Close()
		time.Sleep(time.Hour)
		if opened := feed.conn.(*fakeFeed).openings(); len(opened) != 1 {
			t.Fatal(opened)
		}
	})
}
