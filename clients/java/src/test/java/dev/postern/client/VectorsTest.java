package dev.postern.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.protobuf.util.JsonFormat;
import com.nimbusds.jose.jwk.JWKSet;
import com.nimbusds.jose.util.JSONObjectUtils;
import dev.postern.auth.v1.WatchRevocationsResponse;
import dev.postern.client.Verifier.WhenUnknown;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Clock;
import java.time.Duration;
import java.time.Instant;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.stream.Stream;
import org.junit.jupiter.api.DynamicTest;
import org.junit.jupiter.api.TestFactory;

/**
 * Tokens that the real server has judged. The verdict here has to be the same, and so has the
 * caller.
 */
class VectorsTest {
  @TestFactory
  Stream<DynamicTest> everyVectorHasTheVerdictOfTheServer() throws Exception {
    Path path = Path.of(Env.get("POSTERN_VECTORS"));
    var file = JSONObjectUtils.parse(Files.readString(path));
    Clock clock = Clock.systemUTC();
    Keys keys = Keys.fixed(JWKSet.parse(JSONObjectUtils.getJSONObject(file, "jwks")));
    String issuer = (String) file.get("issuer");
    String audience = (String) file.get("audience");
    Map<String, Object>[] cases = JSONObjectUtils.getJSONObjectArray(file, "cases");
    assertTrue(cases.length > 50, "there are only " + cases.length + " cases");
    return Stream.of(cases)
        .map(
            one ->
                DynamicTest.dynamicTest(
                    (String) one.get("name"),
                    () -> {
                      RevocationState state =
                          new RevocationState(Duration.ofSeconds(30), clock, 1000);
                      Verifier verifier =
                          Verifier.builder(issuer, audience)
                              .keys(keys)
                              .clock(clock)
                              .revocations(state, WhenUnknown.REFUSE)
                              .build();
                      apply(one, state, clock.instant());
                      assertEquals(one.get("verdict"), judge(one, verifier));
                      assertEquals(
                          one.get("verdict"), judge(one, verifier), "when it is remembered");
                    }));
  }

  @TestFactory
  Stream<DynamicTest> tokensOfEveryAlgorithmAreAccepted() throws Exception {
    var file = JSONObjectUtils.parse(Files.readString(Path.of(Env.get("POSTERN_VECTORS"))));
    Map<String, Object>[] algorithms = JSONObjectUtils.getJSONObjectArray(file, "algorithms");
    assertEquals(2, algorithms.length);
    return Stream.of(algorithms)
        .map(
            one ->
                DynamicTest.dynamicTest(
                    (String) one.get("algorithm"),
                    () -> {
                      Verifier verifier =
                          Verifier.builder((String) one.get("issuer"), (String) one.get("audience"))
                              .keys(
                                  Keys.fixed(
                                      JWKSet.parse(JSONObjectUtils.getJSONObject(one, "jwks"))))
                              .build();
                      assertEquals(
                          one.get("subject"), verifier.verify((String) one.get("token")).subject());
                    }));
  }

  private static void apply(Map<String, Object> one, RevocationState state, Instant now)
      throws Exception {
    for (var message : JSONObjectUtils.getJSONObjectArray(one, "revocations")) {
      var parsed = WatchRevocationsResponse.newBuilder();
      JsonFormat.parser().merge(JSONObjectUtils.toJSONString(message), parsed);
      state.apply(parsed.build());
    }
    state.apply(Messages.heartbeat(now));
  }

  private static String judge(Map<String, Object> one, Verifier verifier) throws Exception {
    var demanded = JSONObjectUtils.getJSONObject(one, "demand");
    String kind = (String) demanded.get("subject_type");
    Demand demand =
        kind == null ? Demand.AUTHENTICATED : kind.equals("user") ? Demand.USER : Demand.SERVICE;
    Demands demands =
        new Demands(verifier, Map.of("m", demand.withRole((String) demanded.get("role"))));
    try {
      Caller caller = demands.check("m", List.of("Bearer " + one.get("token"))).orElseThrow();
      assertEquals(one.get("caller"), asJson(caller));
      return "ACCEPTED";
    } catch (PosternException refused) {
      return refused.reason();
    }
  }

  private static Map<String, Object> asJson(Caller caller) {
    Map<String, Object> written =
        new HashMap<>(
            Map.of(
                "subject", caller.subject(),
                "subjectType", caller.subjectType().name().toLowerCase(java.util.Locale.ROOT),
                "clientId", caller.clientId(),
                "sessionId", caller.sessionId(),
                "tokenId", caller.tokenId(),
                "username", caller.username(),
                "roles", caller.roles()));
    if (caller.email().isPresent()) {
      written.put("email", caller.email().get());
      written.put("emailVerified", caller.emailVerified());
    }
    return written;
  }
}
