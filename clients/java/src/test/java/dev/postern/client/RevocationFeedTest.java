package dev.postern.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertNotEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.grpc.ManagedChannel;
import io.grpc.Status.Code;
import java.time.Clock;
import java.time.Duration;
import java.time.Instant;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;

@Timeout(30)
class RevocationFeedTest {
  private static final Duration SILENCE = Duration.ofSeconds(1);

  private final FakePostern postern = new FakePostern(Clock.systemUTC());
  private final ManagedChannel channel = postern.channel();
  private final RevocationState state = new RevocationState();
  private final RevocationFeed feed =
      RevocationFeed.start(channel, TokenSource.service(channel, "shop", "secret"), state, SILENCE);

  @AfterEach
  void stop() {
    feed.close();
    channel.shutdownNow();
    postern.close();
  }

  private static Instant later() {
    return Instant.now().plusSeconds(900);
  }

  /** Waits until what was sent has been applied. */
  private void untilSize(int size) throws Exception {
    for (int i = 0; i < 400 && state.size() != size; i++) {
      Thread.sleep(5);
    }
    assertEquals(size, state.size());
    Thread.sleep(20);
  }

  @Test
  void itBeginsWithoutACursorAndResumesAfterTheLastMessage() throws Exception {
    var first = postern.nextWatch();
    assertEquals("", first.cursor());
    first.send(Messages.ended("one", later()), "c1");
    first.send(Messages.heartbeat(Instant.now()), "c2");
    assertTrue(state.awaitComplete(Duration.ofSeconds(5)));
    untilSize(1);
    long began = System.nanoTime();
    first.out().onError(FakePostern.failure(Code.UNAVAILABLE, "")); // With RetryInfo of 1 s.
    assertEquals("c2", postern.nextWatch().cursor());
    assertTrue(System.nanoTime() - began >= Duration.ofSeconds(1).toNanos());
    assertEquals("UNAVAILABLE", feed.lastFailure().orElseThrow().code().name());
  }

  @Test
  void anExpiredCursorIsDroppedAndWhatIsRememberedStays() throws Exception {
    var first = postern.nextWatch();
    first.send(Messages.ended("one", later()), "c1");
    untilSize(1);
    first.out().onError(FakePostern.failure(Code.OUT_OF_RANGE, Reason.CURSOR_EXPIRED));
    assertEquals("", postern.nextWatch().cursor());
    assertEquals(1, state.size());
  }

  @Test
  void aCursorThatTheServerCannotReadIsDropped() throws Exception {
    var first = postern.nextWatch();
    first.send(Messages.ended("one", later()), "c1");
    untilSize(1);
    first.out().onError(FakePostern.failure(Code.INVALID_ARGUMENT, Reason.INVALID_FIELD));
    assertEquals("", postern.nextWatch().cursor());
  }

  @Test
  void anExpiredTokenIsReplacedAndTheStreamResumed() throws Exception {
    var first = postern.nextWatch();
    first.send(Messages.ended("one", later()), "c1");
    untilSize(1);
    long began = System.nanoTime();
    first.out().onError(FakePostern.failure(Code.UNAUTHENTICATED, Reason.TOKEN_EXPIRED));
    var second = postern.nextWatch();
    assertTrue(System.nanoTime() - began < Duration.ofSeconds(1).toNanos());
    assertEquals("c1", second.cursor());
    assertNotEquals(first.authorization(), second.authorization());
  }

  @Test
  void aSilentStreamIsEndedAndResumed() throws Exception {
    var first = postern.nextWatch();
    first.send(Messages.ended("one", later()), "c1");
    var second = postern.nextWatch();
    assertEquals("c1", second.cursor());
    assertTrue(((io.grpc.stub.ServerCallStreamObserver<?>) first.out()).isCancelled());
  }

  @Test
  void messagesKeepAStreamAlive() throws Exception {
    var only = postern.nextWatch();
    for (int i = 0; i < 6; i++) {
      Thread.sleep(300);
      only.send(Messages.heartbeat(Instant.now()), "c");
    }
    assertEquals(0, postern.watches.size());
    assertTrue(feed.lastFailure().isEmpty());
  }

  @Test
  void aStreamThatTheServerClosesIsResumed() throws Exception {
    postern.nextWatch().out().onCompleted();
    postern.nextWatch();
  }

  @Test
  void itGoesOnWhenTheServiceAccountIsGoneForAWhile() throws Exception {
    var first = postern.nextWatch();
    postern.failNext(Code.UNAUTHENTICATED, Reason.INVALID_CLIENT);
    first.out().onError(FakePostern.failure(Code.UNAUTHENTICATED, Reason.SESSION_REVOKED));
    postern.nextWatch();
    assertEquals(3, postern.calls.size());
  }

  @Test
  void closingEndsTheStream() throws Exception {
    var only = postern.nextWatch();
    feed.close();
    for (int i = 0; i < 400; i++) {
      if (((io.grpc.stub.ServerCallStreamObserver<?>) only.out()).isCancelled()) {
        Thread.sleep(1500);
        assertEquals(0, postern.watches.size());
        return;
      }
      Thread.sleep(5);
    }
    throw new AssertionError("the stream goes on");
  }
}
