package dev.postern.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.postern.client.Verifier.WhenUnknown;
import java.time.Duration;
import java.time.Instant;
import java.util.List;
import java.util.concurrent.CompletableFuture;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;

class RevocationStateTest {
  private static final Duration STALENESS = Duration.ofSeconds(30);

  private final TestClock clock = new TestClock();
  private final RevocationState state = new RevocationState(STALENESS, clock, 3);
  private final Minter minter = new Minter("k");
  private final Verifier refusing =
      minter.verifier().clock(clock).revocations(state, WhenUnknown.REFUSE).build();
  private final Verifier accepting =
      minter.verifier().clock(clock).revocations(state, WhenUnknown.ACCEPT).build();
  private final String token = minter.mint(Minter.person(clock.instant()));
  private Caller caller;

  @BeforeEach
  void someCaller() {
    caller = accepting.verify(token);
  }

  private Instant later() {
    return clock.instant().plusSeconds(900);
  }

  @Test
  void beforeTheFirstHeartbeatAndWhenItIsTooOldTheChoiceDecides() {
    assertEquals("UNAVAILABLE", Refused.code(() -> refusing.verify(token)));
    accepting.verify(token);
    state.apply(Messages.heartbeat(clock.instant()));
    refusing.verify(token);
    clock.advance(STALENESS);
    refusing.verify(token);
    clock.advance(Duration.ofSeconds(1));
    assertEquals("UNAVAILABLE", Refused.code(() -> refusing.verify(token)));
    accepting.verify(token);
  }

  @Test
  void aServerWhoseClockIsAheadDoesNotVouchForTheFuture() {
    state.apply(Messages.heartbeat(clock.instant().plusSeconds(3600)));
    clock.advance(STALENESS.plusSeconds(1));
    assertFalse(state.isComplete());
  }

  @Test
  void anEndedSessionAndARevokedTokenAreRefusedUntilTheyAreForgotten() {
    state.apply(Messages.ended(caller.sessionId(), later()));
    assertEquals("SESSION_REVOKED", Refused.reason(() -> accepting.verify(token)));
    String other = minter.mint(Minter.service(clock.instant()));
    state.apply(Messages.ended(accepting.verify(other).tokenId(), later()));
    assertEquals("SESSION_REVOKED", Refused.reason(() -> accepting.verify(other)));
    clock.advance(Duration.ofSeconds(904));
    assertEquals("SESSION_REVOKED", Refused.reason(() -> state.check(caller, WhenUnknown.ACCEPT)));
    clock.advance(Duration.ofSeconds(1));
    state.check(caller, WhenUnknown.ACCEPT);
    assertEquals(2, state.size());
    state.apply(Messages.heartbeat(clock.instant()));
    assertEquals(0, state.size());
  }

  @Test
  void rolesAreReplacedAndADisabledAccountIsRefusedUntilItIsNot() {
    state.apply(Messages.roles(caller.subject(), later(), false, "user", "admin"));
    assertEquals(List.of("user", "admin"), accepting.verify(token).roles());
    state.apply(Messages.roles(caller.subject(), later(), true));
    assertEquals("SESSION_REVOKED", Refused.reason(() -> accepting.verify(token)));
    state.apply(Messages.roles(caller.subject(), later(), false));
    assertEquals(List.of(), accepting.verify(token).roles());
    clock.advance(Duration.ofSeconds(904));
    assertEquals(List.of(), accepting.verify(token).roles());
    clock.advance(Duration.ofSeconds(1));
    assertEquals(List.of("user"), state.check(caller, WhenUnknown.ACCEPT).roles());
  }

  @Test
  void whatDoesNotFitMakesItUnknownUntilThatWouldBeForgotten() {
    for (int i = 0; i < 4; i++) {
      state.apply(Messages.ended("session-" + i, clock.instant().plusSeconds(100 + i)));
    }
    state.apply(Messages.heartbeat(clock.instant()));
    assertEquals(3, state.size());
    assertEquals("UNAVAILABLE", Refused.code(() -> refusing.verify(token)));
    clock.advance(Duration.ofSeconds(106));
    state.apply(Messages.heartbeat(clock.instant()));
    refusing.verify(token);
  }

  @Test
  void theFirstHeartbeatWakesWhoWaits() throws Exception {
    assertFalse(state.awaitComplete(Duration.ofMillis(20)));
    var waiting = CompletableFuture.supplyAsync(() -> awaits(state));
    Thread.sleep(50);
    state.apply(Messages.heartbeat(clock.instant()));
    assertTrue(waiting.get());
  }

  private static boolean awaits(RevocationState state) {
    try {
      return state.awaitComplete(Duration.ofSeconds(10));
    } catch (InterruptedException interrupted) {
      throw new AssertionError(interrupted);
    }
  }
}
