package dev.postern.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNotEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.postern.auth.v1.AuthServiceGrpc;
import dev.postern.auth.v1.GetMeRequest;
import dev.postern.auth.v1.LoginRequest;
import io.grpc.ClientInterceptors;
import io.grpc.ManagedChannel;
import io.grpc.Status.Code;
import io.grpc.StatusRuntimeException;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.Optional;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;

@Timeout(30)
class TokenSourceTest {
  private final TestClock clock = new TestClock();
  private final FakePostern postern = new FakePostern(clock);
  private final ManagedChannel channel = postern.channel();
  private final RefreshTokenStore store = RefreshTokenStore.inMemory();

  private TokenSource service() {
    return new TokenSource(channel, Grants.service(channel, "shop", "secret"), clock);
  }

  private TokenSource session(String password) {
    Optional<LoginRequest> login =
        Optional.ofNullable(password)
            .map(given -> LoginRequest.newBuilder().setPassword(given).build());
    return new TokenSource(channel, Grants.session(channel, store, login), clock);
  }

  @AfterEach
  void stop() {
    channel.shutdownNow();
    postern.close();
  }

  /** Waits until the renewal that goes on in the background is over. */
  private void untilCalls(int count) throws Exception {
    for (int i = 0; i < 1000 && postern.calls.size() < count; i++) {
      Thread.sleep(5);
    }
    Thread.sleep(50);
    assertEquals(count, postern.calls.size(), postern.calls.toString());
  }

  @Test
  void oneRenewalIsMadeForAllWhoWait() throws Exception {
    CountDownLatch asked = new CountDownLatch(100);
    postern.before.add(() -> await(asked));
    TokenSource source = service();
    List<CompletableFuture<AccessToken>> waiting = new ArrayList<>();
    for (int i = 0; i < 100; i++) {
      waiting.add(source.tokenAsync());
      asked.countDown();
    }
    AccessToken token = waiting.get(0).get();
    for (var one : waiting) {
      assertEquals(token, one.get());
    }
    assertEquals(List.of("issue shop"), postern.calls);
  }

  @Test
  void aCallerWhoGivesUpDoesNotCancelTheRenewalOfOthers() throws Exception {
    CountDownLatch givenUp = new CountDownLatch(1);
    postern.before.add(() -> await(givenUp));
    TokenSource source = service();
    var impatient = source.tokenAsync();
    var patient = source.tokenAsync();
    assertTrue(impatient.cancel(true));
    Thread interrupted = new Thread(() -> assertEquals("CANCELLED", Refused.code(source::token)));
    interrupted.start();
    interrupted.interrupt();
    interrupted.join();
    givenUp.countDown();
    patient.get();
    assertEquals(1, postern.calls.size());
  }

  @Test
  void itRenewsWhenAMinuteIsLeftAndHandsOutTheOldTokenMeanwhile() throws Exception {
    TokenSource source = service();
    AccessToken old = source.token();
    clock.advance(Duration.ofSeconds(839));
    assertEquals(old, source.token());
    untilCalls(1);
    clock.advance(Duration.ofSeconds(1));
    assertEquals(old, source.token());
    untilCalls(2);
    assertNotEquals(old, source.token());
    assertEquals(2, postern.calls.size());
  }

  @Test
  void aShortTokenIsRenewedWhenAFifthOfItsLifeIsLeft() throws Exception {
    List<String> asked = new ArrayList<>();
    TokenSource source =
        new TokenSource(
            channel,
            () -> {
              asked.add("once");
              var claims = Minter.service(clock.instant());
              claims.put("exp", clock.instant().getEpochSecond() + 100);
              return postern.minter.mint(claims);
            },
            clock);
    source.token();
    clock.advance(Duration.ofSeconds(79));
    source.token();
    Thread.sleep(100);
    assertEquals(1, asked.size());
    clock.advance(Duration.ofSeconds(1));
    source.token();
    Thread.sleep(100);
    assertEquals(2, asked.size());
  }

  @Test
  void theClockOfTheServerMayDiffer() {
    TestClock ahead = new TestClock();
    ahead.advance(Duration.ofHours(2));
    TokenSource source = new TokenSource(channel, Grants.service(channel, "shop", "secret"), ahead);
    assertEquals(source.token(), source.token());
    assertEquals(1, postern.calls.size());
  }

  @Test
  void whileTheOldTokenIsValidItIsHandedOutAlthoughItsRenewalFails() throws Exception {
    TokenSource source = service();
    AccessToken old = source.token();
    postern.always =
        () ->
            () -> {
              throw FakePostern.failure(Code.UNAUTHENTICATED, Reason.INVALID_CLIENT);
            };
    clock.advance(Duration.ofSeconds(850));
    assertEquals(old, source.token());
    untilCalls(2);
    assertEquals(old, source.token());
    clock.advance(Duration.ofSeconds(50));
    assertEquals("INVALID_CLIENT", Refused.reason(source::token));
  }

  @Test
  void aFailureIsRememberedForASecondSoThatNobodyFloodsTheServer() {
    postern.failNext(Code.UNAUTHENTICATED, Reason.INVALID_CLIENT);
    TokenSource source = service();
    for (int i = 0; i < 10; i++) {
      assertEquals("INVALID_CLIENT", Refused.reason(source::token));
    }
    assertEquals(1, postern.calls.size());
    clock.advance(Duration.ofSeconds(1));
    source.token();
  }

  @Test
  void aLostAnswerIsAskedForAgainWithTheSameRefreshToken() {
    TokenSource source = session("password");
    source.token();
    clock.advance(Duration.ofSeconds(900));
    postern.failNext(Code.UNAVAILABLE, "");
    postern.failNext(Code.DEADLINE_EXCEEDED, "");
    source.token();
    assertEquals(
        List.of("login password", "refresh refresh-1", "refresh refresh-1", "refresh refresh-1"),
        postern.calls);
    assertEquals(Optional.of("refresh-2"), store.load());
    clock.advance(Duration.ofSeconds(900));
    source.token();
    assertEquals("refresh refresh-2", postern.calls.get(4));
  }

  @Test
  void anAnswerThatStaysLostIsAnErrorAndNoLogout() {
    session("password").token();
    postern.always =
        () ->
            () -> {
              throw FakePostern.failure(Code.DEADLINE_EXCEEDED, "");
            };
    TokenSource source = session("password");
    assertEquals("DEADLINE_EXCEEDED", Refused.code(source::token));
    assertEquals(
        List.of("refresh refresh-1"), postern.calls.subList(1, 6).stream().distinct().toList());
    postern.always = () -> () -> {};
    clock.advance(Duration.ofSeconds(1));
    source.token();
    assertEquals("refresh refresh-1", postern.calls.get(6));
  }

  @Test
  void theServersWishForAPauseIsRespected() {
    postern.failNext(Code.UNAVAILABLE, Reason.STORE_UNAVAILABLE); // With RetryInfo of 1 s.
    long began = System.nanoTime();
    service().token();
    assertTrue(System.nanoTime() - began >= Duration.ofSeconds(1).toNanos());
    assertEquals(2, postern.calls.size());
  }

  @Test
  void anInvalidRefreshTokenIsToldOrAnsweredByALogin() {
    store.save("stolen");
    assertEquals("REFRESH_TOKEN_INVALID", Refused.reason(session(null)::token));
    session("password").token();
    assertEquals(List.of("refresh stolen", "refresh stolen", "login password"), postern.calls);
    assertEquals(Optional.of("refresh-1"), store.load());
  }

  @Test
  void withoutARefreshTokenThereIsNothingToExchange() {
    assertEquals("REFRESH_TOKEN_INVALID", Refused.reason(session(null)::token));
    assertEquals(List.of(), postern.calls);
  }

  @Test
  void aTokenIsHandedOutOnlyWhenTheRefreshTokenIsStored() {
    store.save("refresh-0");
    RefreshTokenStore full =
        new RefreshTokenStore() {
          @Override
          public Optional<String> load() {
            return store.load();
          }

          @Override
          public void save(String refreshToken) {
            throw new IllegalStateException("the disk is full");
          }
        };
    var source = new TokenSource(channel, Grants.session(channel, full, Optional.empty()), clock);
    assertThrows(PosternException.class, source::token);
    assertEquals(Optional.of("refresh-0"), store.load());
  }

  @Test
  void aTokenThatWasRefusedIsNotHandedOutAgain() {
    TokenSource source = service();
    AccessToken refused = source.token();
    source.invalidate(refused);
    AccessToken next = source.token();
    source.invalidate(refused);
    assertEquals(next, source.token());
    assertEquals(2, postern.calls.size());
  }

  private AuthServiceGrpc.AuthServiceBlockingStub calls(TokenSource source) {
    return AuthServiceGrpc.newBlockingStub(
        ClientInterceptors.intercept(channel, source.interceptor()));
  }

  @Test
  void asCredentialsItPutsTheTokenIntoTheCallsOfAChannel() {
    TokenSource source = service();
    calls(source).getMe(GetMeRequest.getDefaultInstance());
    AuthServiceGrpc.newBlockingStub(channel)
        .withCallCredentials(source)
        .getMe(GetMeRequest.getDefaultInstance());
    String sent = "me Bearer " + source.token().value();
    assertEquals(List.of("issue shop", sent, sent), postern.calls);
  }

  @Test
  void aTokenThatACallFindsRevokedIsNotUsedAgain() {
    TokenSource source = service();
    AccessToken old = source.token();
    postern.failNext(Code.UNAUTHENTICATED, Reason.SESSION_REVOKED);
    var stub = calls(source);
    assertThrows(StatusRuntimeException.class, () -> stub.getMe(GetMeRequest.getDefaultInstance()));
    stub.getMe(GetMeRequest.getDefaultInstance());
    assertNotEquals(old, source.token());
    postern.failNext(Code.UNAUTHENTICATED, Reason.TOKEN_INVALID);
    AccessToken current = source.token();
    assertThrows(StatusRuntimeException.class, () -> stub.getMe(GetMeRequest.getDefaultInstance()));
    assertEquals(current, source.token(), "another one would be as invalid");
  }

  @Test
  void aCallForWhichThereIsNoTokenFailsAsTheRenewalDid() {
    postern.failNext(Code.UNAUTHENTICATED, Reason.INVALID_CLIENT);
    var stub = calls(service());
    var thrown =
        assertThrows(
            StatusRuntimeException.class, () -> stub.getMe(GetMeRequest.getDefaultInstance()));
    assertEquals(Code.UNAUTHENTICATED, thrown.getStatus().getCode());
    assertEquals(Reason.INVALID_CLIENT, PosternException.from(thrown).reason());
  }

  @Test
  void aClockThatIsSetBackDoesNotMakeAnybodyWait() {
    postern.failNext(Code.UNAUTHENTICATED, Reason.INVALID_CLIENT);
    TokenSource source = service();
    assertEquals("INVALID_CLIENT", Refused.reason(source::token));
    clock.advance(Duration.ofHours(-1));
    source.token();
  }

  @Test
  void tokensDoNotPrintThemselves() {
    AccessToken token = service().token();
    assertFalse(token.toString().contains(token.value()));
  }

  private static void await(CountDownLatch latch) {
    try {
      assertTrue(latch.await(10, TimeUnit.SECONDS));
    } catch (InterruptedException interrupted) {
      throw new AssertionError(interrupted);
    }
  }
}
