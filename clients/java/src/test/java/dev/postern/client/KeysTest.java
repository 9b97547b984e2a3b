package dev.postern.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNotNull;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertSame;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.nimbusds.jose.jwk.JWKSet;
import com.sun.net.httpserver.HttpServer;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.net.URI;
import java.time.Duration;
import java.time.Instant;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.concurrent.atomic.AtomicLong;
import org.junit.jupiter.api.Test;

class KeysTest {
  private final Minter first = new Minter("first");
  private final Minter second = new Minter("second");
  private final AtomicLong time = new AtomicLong();
  private final AtomicInteger fetches = new AtomicInteger();
  private volatile CompletableFuture<JWKSet> answer =
      CompletableFuture.completedFuture(first.jwks());
  private final Keys keys = new Keys(this::fetch, Keys.DEFAULT_COOLDOWN, time::get);

  private CompletableFuture<JWKSet> fetch() {
    fetches.incrementAndGet();
    return answer.copy();
  }

  private void pass(Duration duration) {
    time.addAndGet(duration.toNanos());
  }

  @Test
  void aThousandFirstChecksMakeOneFetch() throws Exception {
    answer = new CompletableFuture<>();
    Verifier verifier = Verifier.builder(Minter.ISSUER, Minter.AUDIENCE).keys(keys).build();
    String token = first.mint(Minter.person(Instant.now()));
    var pool = Executors.newFixedThreadPool(1000);
    try {
      CountDownLatch started = new CountDownLatch(1000);
      List<Future<Caller>> checks = new ArrayList<>();
      for (int i = 0; i < 1000; i++) {
        checks.add(
            pool.submit(
                () -> {
                  started.countDown();
                  return verifier.verify(token);
                }));
      }
      assertTrue(started.await(30, TimeUnit.SECONDS));
      answer.complete(first.jwks());
      for (Future<Caller> check : checks) {
        assertEquals("ada", check.get(30, TimeUnit.SECONDS).username());
      }
      assertEquals(1, fetches.get());
    } finally {
      pool.shutdownNow();
    }
  }

  @Test
  void aFloodOfUnknownKeysMakesOneFetchPerCooldown() {
    assertNotNull(keys.find("first"));
    assertEquals(1, fetches.get());
    for (int round = 1; round <= 3; round++) {
      pass(Keys.DEFAULT_COOLDOWN);
      for (int i = 0; i < 1000; i++) {
        assertNull(keys.find("unknown-" + i));
      }
      assertEquals(1 + round, fetches.get());
    }
  }

  @Test
  void aNewKeyIsFoundAndAnOldOneStaysTheSame() {
    Keys.Key old = keys.find("first");
    answer = CompletableFuture.completedFuture(new JWKSet(List.of(first.key, second.key)));
    pass(Keys.DEFAULT_COOLDOWN);
    assertNotNull(keys.find("second"));
    assertSame(old, keys.find("first"));
  }

  @Test
  void knownKeysAreFetchedAgainAfterFiveMinutesAndAWithdrawnOneIsRefused() {
    Keys.Key old = keys.find("first");
    answer = CompletableFuture.completedFuture(second.jwks());
    pass(Duration.ofMinutes(5).minusNanos(1));
    assertTrue(keys.has("first", old));
    assertEquals(1, fetches.get());
    pass(Duration.ofNanos(1));
    assertTrue(keys.has("first", old), "this check only begins the fetch");
    assertEquals(2, fetches.get());
    assertFalse(keys.has("first", old));
    assertNotNull(keys.find("second"));
  }

  @Test
  void aRememberedTokenIsRefusedWhenItsKeyWasWithdrawn() {
    Verifier verifier = Verifier.builder(Minter.ISSUER, Minter.AUDIENCE).keys(keys).build();
    String token = first.mint(Minter.person(Instant.now()));
    verifier.verify(token);
    answer = CompletableFuture.completedFuture(second.jwks());
    pass(Duration.ofMinutes(5));
    verifier.verify(token);
    assertEquals("TOKEN_INVALID", Refused.reason(() -> verifier.verify(token)));
  }

  @Test
  void anotherKeyOfTheSameNameIsAnotherKey() {
    Keys.Key old = keys.find("first");
    answer = CompletableFuture.completedFuture(new Minter("first").jwks());
    pass(Duration.ofMinutes(5));
    keys.find("first");
    assertFalse(keys.has("first", old));
  }

  @Test
  void aFailedFetchKeepsTheKeysAndCountsForTheCooldown() {
    keys.find("first");
    answer = CompletableFuture.failedFuture(new IllegalStateException("down"));
    pass(Duration.ofMinutes(5));
    for (int i = 0; i < 10; i++) {
      assertNotNull(keys.find("first"));
      assertNull(keys.find("unknown"));
    }
    assertEquals(2, fetches.get());
    answer = CompletableFuture.completedFuture(second.jwks());
    pass(Keys.DEFAULT_COOLDOWN);
    assertNotNull(keys.find("second"));
  }

  @Test
  void withoutAnyKeysItIsUnavailableAndNotInvalid() {
    answer = CompletableFuture.failedFuture(new IllegalStateException("down"));
    Verifier verifier = Verifier.builder(Minter.ISSUER, Minter.AUDIENCE).keys(keys).build();
    String token = first.mint(Minter.person(Instant.now()));
    assertEquals("UNAVAILABLE", Refused.code(() -> verifier.verify(token)));
    assertEquals("UNAVAILABLE", Refused.code(() -> verifier.verify(token)));
    assertEquals(1, fetches.get());
    answer = CompletableFuture.completedFuture(first.jwks());
    pass(Keys.DEFAULT_COOLDOWN);
    assertEquals("ada", verifier.verify(token).username());
  }

  @Test
  void aFetchThatThrowsIsAFailedFetch() {
    Keys broken =
        new Keys(
            () -> {
              throw new IllegalArgumentException("no such scheme");
            },
            Duration.ZERO,
            time::get);
    assertEquals("UNAVAILABLE", Refused.code(() -> broken.find("first")));
    assertEquals("UNAVAILABLE", Refused.code(() -> broken.find("first")));
  }

  @Test
  void keysForOtherPurposesAreLeftOut() throws Exception {
    String other = first.jwks().toString().replace("\"sig\"", "\"enc\"");
    answer = CompletableFuture.completedFuture(JWKSet.parse(other));
    assertNull(keys.find("first"));
  }

  @Test
  void overHttpKeysComeFromTheIssuerFromAUrlOrFromTheDiscovery() throws Exception {
    HttpServer server =
        HttpServer.create(new InetSocketAddress(InetAddress.getLoopbackAddress(), 0), 0);
    String issuer = "http://127.0.0.1:" + server.getAddress().getPort();
    serve(server, "/.well-known/jwks.json", first.jwks().toString());
    serve(server, "/other", second.jwks().toString());
    serve(
        server,
        "/.well-known/openid-configuration",
        "{\"issuer\":\"" + issuer + "\",\"jwks_uri\":\"" + issuer + "/other\"}");
    server.start();
    try {
      assertNotNull(Keys.ofIssuer(issuer).find("first"));
      assertNotNull(Keys.at(URI.create(issuer + "/other")).find("second"));
      assertNotNull(Keys.discover(issuer).find("second"));
      assertEquals("UNAVAILABLE", Refused.code(() -> Keys.discover(issuer + "/").find("second")));
      assertEquals(
          "UNAVAILABLE",
          Refused.code(() -> Keys.at(URI.create(issuer + "/nowhere")).find("second")));
      assertEquals(
          "UNAVAILABLE",
          Refused.code(() -> Keys.at(URI.create("file:///etc/keys")).find("second")));
    } finally {
      server.stop(0);
    }
  }

  private static void serve(HttpServer server, String path, String body) {
    server.createContext(
        path,
        exchange -> {
          boolean isThis = exchange.getRequestURI().getPath().equals(path);
          exchange.sendResponseHeaders(isThis ? 200 : 404, body.length());
          exchange.getResponseBody().write(body.getBytes(java.nio.charset.StandardCharsets.UTF_8));
          exchange.close();
        });
  }
}
