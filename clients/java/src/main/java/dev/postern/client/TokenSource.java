package dev.postern.client;

import com.nimbusds.jwt.JWTClaimsSet;
import com.nimbusds.jwt.JWTParser;
import dev.postern.auth.v1.LoginRequest;
import io.grpc.CallCredentials;
import io.grpc.Channel;
import io.grpc.ClientInterceptor;
import io.grpc.ManagedChannel;
import io.grpc.Status.Code;
import java.text.ParseException;
import java.time.Clock;
import java.time.Duration;
import java.time.Instant;
import java.util.Optional;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.Executor;
import java.util.concurrent.ThreadLocalRandom;
import java.util.function.Supplier;

/**
 * An access token for outgoing calls that is renewed ahead of time: when a fifth of its lifetime is
 * left, but at most 60 s. As {@link CallCredentials} it puts the token into the metadata of gRPC
 * calls; for others there is {@link #token}. One renewal is made for all who wait. For all threads;
 * create one and keep it.
 *
 * <p>A renewal whose answer was lost, or that was asked to wait, is tried up to five times, with
 * the same refresh token. While the old token is valid, it is handed out although its renewal
 * fails.
 */
public final class TokenSource extends CallCredentials {
  private static final int MAX_TRIES = 5;
  private static final Duration FIRST_BACKOFF = Duration.ofMillis(200);
  private static final Duration LONGEST_WAIT = Duration.ofSeconds(10);
  private static final Duration BETWEEN_RENEWALS = Duration.ofSeconds(1);
  private static final Duration LONGEST_AHEAD = Duration.ofSeconds(60);

  private final Channel channel;
  private final Supplier<String> grant;
  private final Clock clock;
  private final Executor renewals = task -> daemon(task).start();

  private AccessToken current; // All that is not final: guarded by this.
  private Instant renewTime = Instant.MIN;
  private Instant failTime = Instant.MIN;
  private Instant nextTry = Instant.MIN;
  private PosternException failure;
  private CompletableFuture<AccessToken> inFlight;

  TokenSource(Channel channel, Supplier<String> grant, Clock clock) {
    this.channel = channel;
    this.grant = grant;
    this.clock = clock;
  }

  /** The tokens of a service account. */
  public static TokenSource service(Channel channel, String clientId, String clientSecret) {
    return new TokenSource(
        channel, Grants.service(channel, clientId, clientSecret), Clock.systemUTC());
  }

  /**
   * The tokens of a person. It logs in when there is no refresh token yet, and again when that is
   * not valid any more.
   */
  public static TokenSource login(
      Channel channel, String email, String password, RefreshTokenStore store) {
    LoginRequest login = LoginRequest.newBuilder().setEmail(email).setPassword(password).build();
    return new TokenSource(
        channel, Grants.session(channel, store, Optional.of(login)), Clock.systemUTC());
  }

  /**
   * The tokens of the session whose refresh token is in the store. When that is not valid any more,
   * it fails with {@link Reason#REFRESH_TOKEN_INVALID} until there is another one.
   */
  public static TokenSource session(Channel channel, RefreshTokenStore store) {
    return new TokenSource(
        channel, Grants.session(channel, store, Optional.empty()), Clock.systemUTC());
  }

  /**
   * A token that is valid now. Waits for a renewal only if there is none.
   *
   * @throws PosternException what the renewal failed with; CANCELLED if the thread was interrupted,
   *     which stops no renewal
   */
  public AccessToken token() {
    try {
      return tokenAsync().get();
    } catch (ExecutionException failed) {
      throw PosternException.from(failed.getCause());
    } catch (InterruptedException interrupted) {
      Thread.currentThread().interrupt();
      throw PosternException.refusal(
          Code.CANCELLED, "", "interrupted while waiting for an access token");
    }
  }

  /**
   * The same without waiting. It fails with a {@link PosternException}; cancelling it cancels
   * nothing for others.
   */
  public synchronized CompletableFuture<AccessToken> tokenAsync() {
    Instant now = clock.instant();
    boolean isValid = current != null && now.isBefore(current.expireTime());
    // A clock that was set back must not make anybody wait longer.
    boolean mayTry = !now.isBefore(nextTry) || now.isBefore(failTime);
    if ((!isValid || !now.isBefore(renewTime)) && inFlight == null && mayTry) {
      CompletableFuture<AccessToken> renewal = new CompletableFuture<>();
      inFlight = renewal;
      renewals.execute(() -> renew(renewal));
    }
    if (isValid) {
      return CompletableFuture.completedFuture(current);
    }
    return inFlight == null ? CompletableFuture.failedFuture(failure) : inFlight.copy();
  }

  /**
   * Forgets this token, because a server has refused it although it has not expired: the next
   * caller gets another one.
   */
  public synchronized void invalidate(AccessToken refused) {
    if (refused.equals(current)) {
      current = null;
    }
  }

  private void renew(CompletableFuture<AccessToken> renewal) {
    AccessToken token = null;
    PosternException failed = null;
    Duration lifetime = Duration.ZERO;
    try {
      String value = grantWithRetries();
      lifetime = lifetime(value);
      token = new AccessToken(value, clock.instant().plus(lifetime));
    } catch (RuntimeException | InterruptedException thrown) {
      failed = PosternException.from(thrown);
    }
    synchronized (this) {
      Instant now = clock.instant();
      inFlight = null;
      failure = failed;
      if (failed == null) {
        current = token;
        Duration ahead = lifetime.dividedBy(5);
        renewTime =
            token.expireTime().minus(ahead.compareTo(LONGEST_AHEAD) < 0 ? ahead : LONGEST_AHEAD);
        nextTry = Instant.MIN;
      } else {
        failTime = now;
        nextTry = now.plus(failed.retryDelay().orElse(BETWEEN_RENEWALS));
      }
    }
    // Outside of the lock: this runs what others have attached.
    if (failed == null) {
      renewal.complete(token);
    } else {
      renewal.completeExceptionally(failed);
    }
  }

  /**
   * A lost answer says nothing: the same is asked for again, later and later, and not before the
   * server wants it.
   */
  private String grantWithRetries() throws InterruptedException {
    for (int tries = 1; ; tries++) {
      try {
        return grant.get();
      } catch (RuntimeException thrown) {
        PosternException failed = PosternException.from(thrown);
        double jitter = 0.5 + ThreadLocalRandom.current().nextDouble();
        Duration backoff =
            Duration.ofMillis((long) (FIRST_BACKOFF.toMillis() * (1 << tries - 1) * jitter));
        Duration wait = failed.retryDelay().map(asked -> asked.plus(backoff)).orElse(backoff);
        if (!failed.isTransient() || tries == MAX_TRIES || wait.compareTo(LONGEST_WAIT) > 0) {
          throw failed;
        }
        Thread.sleep(wait.toMillis());
        if (channel instanceof ManagedChannel managed) {
          managed.resetConnectBackoff(); // Else gRPC itself may refuse to connect for minutes.
        }
      }
    }
  }

  /**
   * How long the token lives by its own claims, so that it does not matter whether the clocks of
   * two machines agree.
   */
  private static Duration lifetime(String token) {
    try {
      JWTClaimsSet claims = JWTParser.parse(token).getJWTClaimsSet();
      return Duration.between(
          claims.getIssueTime().toInstant(), claims.getExpirationTime().toInstant());
    } catch (ParseException | NullPointerException malformed) {
      throw PosternException.refusal(Code.INTERNAL, "", "the answer has no access token");
    }
  }

  @Override
  public void applyRequestMetadata(RequestInfo call, Executor executor, MetadataApplier applier) {
    new Bearer(this).applyRequestMetadata(call, executor, applier);
  }

  /**
   * Puts the token into every call of a channel: {@code ClientInterceptors.intercept(channel,
   * source.interceptor())}. A token that is refused as expired or revoked is not used again: the
   * call that has found out fails, and the next one has another token.
   */
  public ClientInterceptor interceptor() {
    return Bearer.interceptor(this);
  }

  private static Thread daemon(Runnable task) {
    Thread thread = new Thread(task, "postern-token-renewal");
    thread.setDaemon(true);
    return thread;
  }
}
