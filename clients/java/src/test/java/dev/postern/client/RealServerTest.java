package dev.postern.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertNotEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.postern.auth.v1.AuthServiceGrpc;
import dev.postern.auth.v1.GetMeRequest;
import dev.postern.auth.v1.LogoutRequest;
import dev.postern.auth.v1.SignUpRequest;
import dev.postern.client.Env.Person;
import dev.postern.client.Verifier.WhenUnknown;
import io.grpc.CallOptions;
import io.grpc.Channel;
import io.grpc.ClientCall;
import io.grpc.ClientInterceptor;
import io.grpc.ClientInterceptors;
import io.grpc.ForwardingClientCall.SimpleForwardingClientCall;
import io.grpc.ForwardingClientCallListener.SimpleForwardingClientCallListener;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import java.time.Clock;
import java.time.Duration;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.function.Supplier;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;

/** Against the server of the stage. */
@Timeout(120)
class RealServerTest {
  private final ManagedChannel channel = Env.channel();

  @AfterEach
  void stop() {
    channel.shutdownNow();
  }

  private static String verdict(Verifier verifier, String token) {
    try {
      verifier.verify(token);
      return "ACCEPTED";
    } catch (PosternException refused) {
      return refused.reason();
    }
  }

  /** How long it takes until the probe says so. */
  private static Duration until(String wanted, Supplier<String> probe, Duration atMost)
      throws Exception {
    long began = System.nanoTime();
    String last;
    do {
      last = probe.get();
      if (last.equals(wanted)) {
        return Duration.ofNanos(System.nanoTime() - began);
      }
      Thread.sleep(10);
    } while (System.nanoTime() - began < atMost.toNanos());
    throw new AssertionError("it stays " + last + " and does not become " + wanted);
  }

  @Test
  void tokensVerifyBeforeAndAfterARotationOfTheKeys() throws Exception {
    Verifier verifier = Env.verifier().build();
    Person before = Env.person();
    Caller caller = verifier.verify(before.accessToken());
    assertEquals(before.id(), caller.subject());
    assertEquals(before.email(), caller.email().orElseThrow());
    Env.post("/keys/rotate", "");
    Person after = Env.person();
    // The keys may have been fetched just now: within the cooldown an unknown key is not looked
    // for.
    until(
        "ACCEPTED",
        () -> verdict(verifier, after.accessToken()),
        Keys.DEFAULT_COOLDOWN.plusSeconds(2));
    verifier.verify(before.accessToken());
    Verifier discovering = Env.verifier().keys(Keys.discover(Env.get("POSTERN_ISSUER"))).build();
    assertEquals("ACCEPTED", verdict(discovering, after.accessToken()));
  }

  @Test
  void aLogoutIsKnownWithinASecondAndSoIsADisabledAccount() throws Exception {
    RevocationState state = new RevocationState();
    try (var feed = RevocationFeed.start(channel, Env.service(channel), state)) {
      Verifier verifier = Env.verifier().revocations(state, WhenUnknown.REFUSE).build();
      assertTrue(
          state.awaitComplete(Duration.ofSeconds(10)), () -> "incomplete: " + feed.lastFailure());
      Person ada = Env.person();
      Person joan = Env.person();
      verifier.verify(ada.accessToken());
      verifier.verify(joan.accessToken());
      Env.logOut(ada);
      Duration took =
          until(
              "SESSION_REVOKED", () -> verdict(verifier, ada.accessToken()), Duration.ofSeconds(5));
      assertTrue(took.compareTo(Duration.ofSeconds(1)) < 0, "it took " + took);
      Env.post("/disable?id=" + joan.id(), "");
      took =
          until(
              "SESSION_REVOKED",
              () -> verdict(verifier, joan.accessToken()),
              Duration.ofSeconds(5));
      assertTrue(took.compareTo(Duration.ofSeconds(1)) < 0, "it took " + took);
    }
  }

  @Test
  void whenTheFeedIsCutTheChosenThingHappensAndAfterwardsEverythingIsKnown() throws Exception {
    ManagedChannel proxied = Env.channelTo(Env.get("POSTERN_FEED_ADDR"));
    RevocationState state = new RevocationState(Duration.ofSeconds(6));
    try (var feed = RevocationFeed.start(proxied, Env.service(channel), state)) {
      Verifier refusing = Env.verifier().revocations(state, WhenUnknown.REFUSE).build();
      Verifier accepting = Env.verifier().revocations(state, WhenUnknown.ACCEPT).build();
      assertTrue(
          state.awaitComplete(Duration.ofSeconds(10)), () -> "incomplete: " + feed.lastFailure());
      Person ada = Env.person();
      Person joan = Env.person();
      assertEquals("ACCEPTED", verdict(refusing, ada.accessToken()));
      Env.post("/feed/cut", "");
      Env.logOut(ada);
      until(
          "STORE_UNAVAILABLE", () -> verdict(refusing, ada.accessToken()), Duration.ofSeconds(15));
      assertEquals("ACCEPTED", verdict(accepting, ada.accessToken()));
      assertEquals("UNAVAILABLE", feed.lastFailure().orElseThrow().code().name());
      Env.post("/feed/restore", "");
      until("SESSION_REVOKED", () -> verdict(refusing, ada.accessToken()), Duration.ofSeconds(10));
      until("ACCEPTED", () -> verdict(refusing, joan.accessToken()), Duration.ofSeconds(10));
      assertEquals("SESSION_REVOKED", verdict(accepting, ada.accessToken()));
    } finally {
      Env.post("/feed/restore", "");
      proxied.shutdownNow();
    }
  }

  /** Drops the answers of refreshes after the server has carried them out. */
  private static final class Lossy implements ClientInterceptor {
    final AtomicInteger lost = new AtomicInteger();

    @Override
    public <Q, A> ClientCall<Q, A> interceptCall(
        MethodDescriptor<Q, A> method, CallOptions options, Channel next) {
      return new SimpleForwardingClientCall<>(next.newCall(method, options)) {
        @Override
        public void start(Listener<A> listener, Metadata headers) {
          boolean loses =
              method.getFullMethodName().endsWith("/Refresh") && lost.getAndIncrement() < 2;
          super.start(
              new SimpleForwardingClientCallListener<A>(listener) {
                @Override
                public void onMessage(A message) {
                  if (!loses) {
                    super.onMessage(message);
                  }
                }

                @Override
                public void onClose(Status status, Metadata trailers) {
                  super.onClose(
                      loses ? Status.UNAVAILABLE.withDescription("lost") : status, trailers);
                }
              },
              headers);
        }
      };
    }
  }

  @Test
  void aRefreshWhoseAnswerIsLostLogsNobodyOut() throws Exception {
    Person ada = Env.person();
    RefreshTokenStore store = RefreshTokenStore.inMemory();
    store.save(ada.refreshToken());
    Lossy lossy = new Lossy();
    TokenSource source = TokenSource.session(ClientInterceptors.intercept(channel, lossy), store);
    assertEquals(ada.id(), Env.verifier().build().verify(source.token().value()).subject());
    assertEquals(3, lossy.lost.get());
    assertNotEquals(ada.refreshToken(), store.load().orElseThrow());
    assertEquals(ada.username(), me(source));
    // And the session goes on.
    assertEquals(ada.username(), me(TokenSource.session(channel, store)));
  }

  private String me(TokenSource source) {
    return AuthServiceGrpc.newBlockingStub(channel)
        .withCallCredentials(source)
        .getMe(GetMeRequest.getDefaultInstance())
        .getUser()
        .getUsername();
  }

  @Test
  void aLoginIsRepeatedWhenItsSessionHasEnded() throws Exception {
    Person ada = Env.person();
    RefreshTokenStore store = RefreshTokenStore.inMemory();
    TokenSource source = TokenSource.login(channel, ada.email(), ada.password(), store);
    AccessToken first = source.token();
    assertEquals(ada.username(), me(source));
    AuthServiceGrpc.newBlockingStub(channel)
        .logout(LogoutRequest.newBuilder().setRefreshToken(store.load().orElseThrow()).build());
    source.invalidate(first);
    assertEquals(ada.username(), me(source));
    // Without the password it is told.
    Env.logOut(ada);
    store.save(ada.refreshToken());
    assertEquals(
        "REFRESH_TOKEN_INVALID", Refused.reason(TokenSource.session(channel, store)::token));
  }

  @Test
  void aServiceAccountGetsATokenUntilItIsDisabled() throws Exception {
    var made = Env.post("/services", "");
    String id = (String) made.get("clientId");
    TokenSource source = TokenSource.service(channel, id, (String) made.get("clientSecret"));
    Caller caller = Env.verifier().build().verify(source.token().value());
    assertEquals(id, caller.subject());
    assertEquals(Caller.SubjectType.SERVICE, caller.subjectType());
    Env.post("/disable?id=" + id, "");
    TokenSource again =
        new TokenSource(
            channel,
            Grants.service(channel, id, (String) made.get("clientSecret")),
            Clock.systemUTC());
    assertEquals("INVALID_CLIENT", Refused.reason(again::token));
  }

  @Test
  void theFieldsThatWereRefusedAreRead() {
    try {
      AuthServiceGrpc.newBlockingStub(channel)
          .signUp(
              SignUpRequest.newBuilder()
                  .setUsername("-")
                  .setEmail("ada")
                  .setPassword("short")
                  .build());
      throw new AssertionError("accepted");
    } catch (StatusRuntimeException thrown) {
      PosternException failure = PosternException.from(thrown);
      assertEquals(Reason.INVALID_FIELD, failure.reason());
      assertEquals(3, failure.fieldViolations().size());
      assertEquals("email", failure.fieldViolations().get(1).field());
    }
  }
}
