package dev.postern.client;

import static java.nio.charset.StandardCharsets.ISO_8859_1;
import static java.nio.charset.StandardCharsets.UTF_8;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.nimbusds.jose.util.JSONObjectUtils;
import java.time.Duration;
import java.util.Map;
import java.util.stream.Stream;
import org.junit.jupiter.api.Test;

class VerifierTest {
  private static final String HEADER = "{\"typ\":\"at+jwt\",\"alg\":\"ES256\",\"kid\":\"k\"}";

  private final TestClock clock = new TestClock();
  private final Minter minter = new Minter("k");
  private final Verifier verifier = minter.verifier().clock(clock).build();
  private final String claims = JSONObjectUtils.toJSONString(Minter.person(clock.instant()));

  private String verdict(String token) {
    try {
      verifier.verify(token);
      return "ACCEPTED";
    } catch (PosternException refused) {
      return refused.reason();
    }
  }

  @Test
  void aPersonsTokenSaysWhoTheyAre() {
    Map<String, Object> claims = Minter.person(clock.instant());
    Caller caller = verifier.verify(minter.mint(claims));
    assertEquals(claims.get("sub"), caller.subject());
    assertEquals(Caller.SubjectType.USER, caller.subjectType());
    assertEquals("ada@example.com", caller.email().orElseThrow());
    assertTrue(caller.emailVerified());
    assertTrue(caller.hasRole("user"));
    assertEquals(clock.instant().plusSeconds(900), caller.expireTime());
  }

  @Test
  void aTokenExpiresFiveSecondsAfterItSaysSoAlsoWhenItIsRemembered() {
    String token = minter.mint(HEADER, claims);
    assertEquals("ACCEPTED", verdict(token));
    clock.advance(Duration.ofSeconds(904));
    assertEquals("ACCEPTED", verdict(token));
    clock.advance(Duration.ofSeconds(1));
    assertEquals("TOKEN_EXPIRED", verdict(token));
  }

  @Test
  void aTokenFromTheFutureIsInvalidUntilFiveSecondsBeforeItsTime() {
    String token = minter.mint(Minter.person(clock.instant().plusSeconds(6)));
    assertEquals("TOKEN_INVALID", verdict(token));
    clock.advance(Duration.ofSeconds(1));
    assertEquals("ACCEPTED", verdict(token));
  }

  @Test
  void anExpiredTokenWhoseSignatureIsWrongIsInvalid() {
    String token = minter.mint(HEADER, claims);
    clock.advance(Duration.ofHours(1));
    assertEquals(
        "TOKEN_INVALID", verdict(token.substring(0, token.length() - 86) + "A".repeat(86)));
  }

  @Test
  void onlyStrictTokensAreRead() {
    String token = minter.mint(HEADER, claims);
    assertEquals("ACCEPTED", verdict(token));
    Stream.of(
            "",
            "..",
            "a.b",
            token + "=",
            token + ".",
            "." + token,
            " " + token,
            token + "\n",
            token + "\ud800",
            token.replaceFirst("\\.", "=."),
            // Another last character whose bits beyond the last byte mean nothing.
            token.substring(0, token.length() - 1) + (char) (token.charAt(token.length() - 1) + 1),
            minter.mint("[" + HEADER + "]", claims),
            minter.mint("null", claims),
            minter.mint(HEADER + " x", claims),
            minter.mint(HEADER.replace("\"k\"", "\"k\",\"kid\":\"k\""), claims),
            minter.mint(HEADER.replace('"', '\''), claims),
            minter.mint(HEADER, claims.replaceFirst("\"iss\"", "\"iss\":\"x\",\"iss\"")),
            minter.mint(HEADER, claims.replace(":9", ": 9").replaceFirst("(\"exp\":\\d+)", "$1.0")),
            minter.mint(
                HEADER, claims.replaceFirst("\"exp\":\\d+", "\"exp\":99999999999999999999")),
            minter.mint(HEADER, claims.replaceFirst("\\{", "{\"gen\":\"x\",")),
            minter.mint(HEADER, "null"),
            minter.mint(
                HEADER.getBytes(UTF_8), claims.replace("ada", "\u00e4").getBytes(ISO_8859_1)))
        .forEach(refused -> assertEquals("TOKEN_INVALID", verdict(refused), refused));
  }

  @Test
  void aTokenOfMoreThanEightKilobytesIsNotDecoded() {
    Map<String, Object> claims = Minter.person(clock.instant());
    claims.put("username", "a".repeat(8000));
    assertEquals("TOKEN_INVALID", verdict(minter.mint(claims)));
  }

  @Test
  void aRememberedTokenCostsNoSignatureCheck() {
    String token = minter.mint(HEADER, claims);
    verifier.verify(token);
    long began = System.nanoTime();
    for (int i = 0; i < 20_000; i++) {
      verifier.verify(token);
    }
    // With signature checks these are several seconds.
    assertTrue(System.nanoTime() - began < Duration.ofSeconds(1).toNanos());
  }
}
