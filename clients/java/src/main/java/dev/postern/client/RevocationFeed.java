package dev.postern.client;

import dev.postern.auth.v1.TokenServiceGrpc;
import dev.postern.auth.v1.WatchRevocationsRequest;
import dev.postern.auth.v1.WatchRevocationsResponse;
import io.grpc.Channel;
import io.grpc.Context;
import io.grpc.Context.CancellableContext;
import io.grpc.ManagedChannel;
import io.grpc.Status;
import io.grpc.Status.Code;
import io.grpc.stub.StreamObserver;
import java.lang.System.Logger.Level;
import java.time.Duration;
import java.util.Optional;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ThreadLocalRandom;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;

/**
 * Follows {@code WatchRevocations} in a thread of its own, and applies what comes to a {@link
 * RevocationState}. When the stream ends, it resumes after the last message; it never gives up
 * before {@link #close}.
 */
public final class RevocationFeed implements AutoCloseable {
  private static final System.Logger LOG = System.getLogger(RevocationFeed.class.getName());

  /** A heartbeat comes every 5 s. A stream that is silent for longer is dead. */
  private static final Duration LONGEST_SILENCE = Duration.ofSeconds(10);

  private static final Duration BETWEEN_STREAMS = Duration.ofSeconds(1);
  private static final Duration AT_ONCE = Duration.ofMillis(100);

  private final Channel channel;
  private final TokenSource tokens;
  private final RevocationState state;
  private final long longestSilence;
  private final CancellableContext lifetime = Context.ROOT.withCancellation();
  private final Thread thread = new Thread(this::follow, "postern-revocations");

  private volatile String cursor = "";
  private volatile PosternException lastFailure;

  private RevocationFeed(
      Channel channel, TokenSource tokens, RevocationState state, Duration longestSilence) {
    this.channel = channel;
    this.tokens = tokens;
    this.state = state;
    this.longestSilence = longestSilence.toNanos();
    thread.setDaemon(true);
    thread.start();
  }

  /**
   * Begins to follow.
   *
   * @param channel to Postern. If it is a {@link ManagedChannel}, a stream that is silent makes it
   *     connect anew
   * @param tokens of a service account: {@link TokenSource#service}
   * @param state what was revoked
   */
  public static RevocationFeed start(Channel channel, TokenSource tokens, RevocationState state) {
    return start(channel, tokens, state, LONGEST_SILENCE);
  }

  static RevocationFeed start(
      Channel channel, TokenSource tokens, RevocationState state, Duration longestSilence) {
    return new RevocationFeed(channel, tokens, state, longestSilence);
  }

  /** What the last stream ended with; empty while messages come. */
  public Optional<PosternException> lastFailure() {
    return Optional.ofNullable(lastFailure);
  }

  /** Ends the stream and its thread. What the state knows stays, and soon counts as unknown. */
  @Override
  public void close() {
    lifetime.cancel(null);
    thread.interrupt();
  }

  private void follow() {
    try {
      while (!lifetime.isCancelled()) {
        Duration wait = afterFailure(watch());
        Thread.sleep((long) (wait.toMillis() * (1 + ThreadLocalRandom.current().nextDouble() / 4)));
      }
    } catch (InterruptedException closed) {
      // This is how close() ends it.
    }
  }

  /** How long to wait before the next stream. */
  private Duration afterFailure(PosternException ended) {
    boolean isExpected = ended.reason().equals(Reason.TOKEN_EXPIRED) || lifetime.isCancelled();
    Level level = lastFailure == null && !isExpected ? Level.WARNING : Level.DEBUG;
    LOG.log(level, "no revocations come: " + ended.code() + " " + ended.getMessage());
    lastFailure = ended;
    if (ended.reason().equals(Reason.CURSOR_EXPIRED) || ended.code() == Code.INVALID_ARGUMENT) {
      cursor = ""; // What is remembered stays: it may still matter.
    }
    if (ended.reason().equals(Reason.TOKEN_EXPIRED)) {
      return AT_ONCE;
    }
    if (channel instanceof ManagedChannel managed) {
      managed.resetConnectBackoff(); // Else gRPC itself may refuse to connect for minutes.
    }
    return ended.retryDelay().orElse(BETWEEN_STREAMS);
  }

  /** Follows one stream to its end. */
  private PosternException watch() throws InterruptedException {
    Stream stream = new Stream();
    Bearer credentials = new Bearer(tokens);
    CancellableContext context = lifetime.withCancellation();
    try {
      var request = WatchRevocationsRequest.newBuilder().setResumeCursor(cursor).build();
      var stub = TokenServiceGrpc.newStub(channel).withCallCredentials(credentials);
      context.run(() -> stub.watchRevocations(request, stream));
      PosternException ended = stream.await();
      credentials.ended(ended);
      return ended;
    } finally {
      context.cancel(null);
    }
  }

  /**
   * Takes the messages of one stream. They are applied where gRPC hands them over, so that none
   * waits in memory.
   */
  private final class Stream implements StreamObserver<WatchRevocationsResponse> {
    private final CompletableFuture<PosternException> end = new CompletableFuture<>();
    private volatile long heardAt = System.nanoTime();

    @Override
    public void onNext(WatchRevocationsResponse message) {
      if (end.isDone()) {
        return; // It was given up: another stream may be ahead of it.
      }
      state.apply(message);
      cursor = message.getCursor(); // Only now: what was not applied must come again.
      heardAt = System.nanoTime();
      lastFailure = null;
    }

    @Override
    public void onError(Throwable failure) {
      end.complete(PosternException.from(failure));
    }

    @Override
    public void onCompleted() {
      onError(Status.UNAVAILABLE.withDescription("the stream was closed").asRuntimeException());
    }

    /** Waits until it ends by itself, or gives it up when it is silent. */
    PosternException await() throws InterruptedException {
      while (true) {
        long left = heardAt + longestSilence - System.nanoTime();
        if (left <= 0) {
          onError(Status.UNAVAILABLE.withDescription("the stream is silent").asRuntimeException());
          if (channel instanceof ManagedChannel managed) {
            managed.enterIdle(); // The connection may be dead, too.
          }
        }
        try {
          return end.get(left, TimeUnit.NANOSECONDS);
        } catch (TimeoutException heardMeanwhile) {
          // Or not: the next round tells.
        } catch (java.util.concurrent.ExecutionException impossible) {
          throw new IllegalStateException(impossible);
        }
      }
    }
  }
}
