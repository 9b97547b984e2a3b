package dev.postern.client;

import com.google.protobuf.Timestamp;
import dev.postern.auth.v1.RolesChanged;
import dev.postern.auth.v1.WatchRevocationsResponse;
import dev.postern.client.Verifier.WhenUnknown;
import io.grpc.Status.Code;
import java.time.Clock;
import java.time.Duration;
import java.time.Instant;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.TimeUnit;

/**
 * What was revoked and may still matter, from the messages of {@code WatchRevocations}. It knows no
 * network: {@link RevocationFeed} applies the messages. For all threads.
 */
public final class RevocationState {
  /** How old the knowledge may be before it counts as unknown, as in Postern itself. */
  public static final Duration DEFAULT_MAX_STALENESS = Duration.ofSeconds(30);

  /** How many revocations are remembered. Each takes about 300 bytes. */
  private static final int MAX_ENTRIES = 1_000_000;

  private record Standing(List<String> roles, boolean isRefused, Instant forgetTime) {}

  private final Duration maxStaleness;
  private final Clock clock;
  private final int maxEntries;
  private final Map<String, Instant> ended = new LinkedHashMap<>();
  private final Map<String, Standing> accounts = new LinkedHashMap<>();
  private Instant completeTime = Instant.MIN;
  private Instant overflowUntil = Instant.MIN;

  /** A state that knows nothing, and says so until its first heartbeat. */
  public RevocationState() {
    this(DEFAULT_MAX_STALENESS);
  }

  /**
   * The same, with another limit than {@link #DEFAULT_MAX_STALENESS}. Heartbeats come every 5 s.
   */
  public RevocationState(Duration maxStaleness) {
    this(maxStaleness, Clock.systemUTC(), MAX_ENTRIES);
  }

  RevocationState(Duration maxStaleness, Clock clock, int maxEntries) {
    this.maxStaleness = maxStaleness;
    this.clock = clock;
    this.maxEntries = maxEntries;
  }

  /** Takes a message of the stream. Taking one twice changes nothing. */
  public synchronized void apply(WatchRevocationsResponse message) {
    Instant forgetTime = instant(message.getForgetTime()).plusSeconds(Verifier.LEEWAY);
    switch (message.getEventCase()) {
      case SESSION_ENDED ->
          ended.merge(message.getSessionEnded().getSessionId(), forgetTime, RevocationState::later);
      case ROLES_CHANGED -> {
        RolesChanged change = message.getRolesChanged();
        accounts.put(
            change.getUserId(),
            new Standing(List.copyOf(change.getRolesList()), change.getDisabled(), forgetTime));
      }
      case HEARTBEAT -> {
        // A server whose clock is ahead must not vouch for what is still to come.
        completeTime = earlier(instant(message.getHeartbeat().getCompleteTime()), clock.instant());
        forget();
        notifyAll();
      }
      case EVENT_NOT_SET -> {} // A kind of event that is newer than this library.
    }
    makeRoom();
  }

  /** Whether all is known that was revoked until {@code max_staleness} ago. */
  public synchronized boolean isComplete() {
    Instant now = clock.instant();
    return !completeTime.plus(maxStaleness).isBefore(now) && overflowUntil.isBefore(now);
  }

  /** The {@code complete_time} of the last heartbeat; {@link Instant#MIN} before the first one. */
  public synchronized Instant completeTime() {
    return completeTime;
  }

  /** How many revocations are remembered. */
  public synchronized int size() {
    return ended.size() + accounts.size();
  }

  /** Waits until it is complete. False if it is not within this time. */
  public synchronized boolean awaitComplete(Duration atMost) throws InterruptedException {
    long deadline = System.nanoTime() + atMost.toNanos();
    while (!isComplete()) {
      long left = TimeUnit.NANOSECONDS.toMillis(deadline - System.nanoTime());
      if (left <= 0) {
        return false;
      }
      wait(left);
    }
    return true;
  }

  /** The caller with its current roles. */
  synchronized Caller check(Caller caller, WhenUnknown whenUnknown) {
    Instant now = clock.instant();
    Standing standing = accounts.get(caller.subject());
    boolean hasStanding = standing != null && now.isBefore(standing.forgetTime);
    boolean isRefused = hasStanding && standing.isRefused;
    if (isRefused || hasEnded(caller.sessionId(), now) || hasEnded(caller.tokenId(), now)) {
      throw Verifier.unauthenticated(Reason.SESSION_REVOKED, "the session has ended");
    }
    if (whenUnknown == WhenUnknown.REFUSE && !isComplete()) {
      throw PosternException.refusal(
          Code.UNAVAILABLE, Reason.STORE_UNAVAILABLE, "revocations unknown");
    }
    return hasStanding ? caller.withRoles(standing.roles) : caller;
  }

  private boolean hasEnded(String id, Instant now) {
    Instant forgetTime = ended.get(id);
    return forgetTime != null && now.isBefore(forgetTime);
  }

  private void forget() {
    Instant now = clock.instant();
    ended.values().removeIf(forgetTime -> !now.isBefore(forgetTime));
    accounts.values().removeIf(standing -> !now.isBefore(standing.forgetTime));
  }

  /**
   * Drops the oldest session, or account, and is not complete until that would have been forgotten
   * anyway.
   */
  private void makeRoom() {
    while (ended.size() + accounts.size() > maxEntries) {
      boolean ofSessions = !ended.isEmpty();
      var oldest = ofSessions ? ended.values().iterator() : accounts.values().iterator();
      Object dropped = oldest.next();
      oldest.remove();
      overflowUntil =
          later(
              overflowUntil, dropped instanceof Standing old ? old.forgetTime : (Instant) dropped);
    }
  }

  private static Instant later(Instant one, Instant other) {
    return one.isAfter(other) ? one : other;
  }

  private static Instant earlier(Instant one, Instant other) {
    return one.isBefore(other) ? one : other;
  }

  private static Instant instant(Timestamp time) {
    return Instant.ofEpochSecond(time.getSeconds(), time.getNanos());
  }
}
