package dev.postern.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;

import java.time.Instant;
import java.util.List;
import java.util.Map;
import org.junit.jupiter.api.Test;

class DemandsTest {
  private final Minter minter = new Minter("k");
  private final Demands demands =
      new Demands(
          minter.verifier().build(),
          Map.of(
              "public", Demand.PUBLIC,
              "any", Demand.AUTHENTICATED,
              "user", Demand.USER,
              "service", Demand.SERVICE,
              "admin", Demand.AUTHENTICATED.withRole("admin"),
              "verified", Demand.USER.withVerifiedEmail(),
              "user and admin", Demand.USER.withRole("admin").withVerifiedEmail(),
              "GET /orders", Demand.AUTHENTICATED,
              "DELETE /orders/*", Demand.PUBLIC));

  private String verdict(String method, String... authorization) {
    try {
      demands.check(method, List.of(authorization));
      return "ACCEPTED";
    } catch (PosternException refused) {
      return refused.code() + " " + refused.reason();
    }
  }

  private String bearer(Map<String, Object> claims) {
    return "Bearer " + minter.mint(claims);
  }

  @Test
  void everyDemandIsMadeOfEveryCaller() {
    Instant now = Instant.now();
    String person = bearer(Minter.person(now));
    var claims = Minter.person(now);
    claims.put("email_verified", false);
    claims.put("roles", List.of("user", "admin"));
    String unverifiedAdmin = bearer(claims);
    String service = bearer(Minter.service(now));
    String serviceAdmin = bearer(Minter.service(now, "admin"));

    var role = "PERMISSION_DENIED ROLE_REQUIRED";
    var user = "PERMISSION_DENIED USER_REQUIRED";
    var email = "PERMISSION_DENIED EMAIL_NOT_VERIFIED";
    var ok = "ACCEPTED";
    Map<String, List<String>> table =
        Map.of(
            "public", List.of(ok, ok, ok, ok),
            "any", List.of(ok, ok, ok, ok),
            "user", List.of(ok, ok, user, user),
            "service",
                List.of(
                    "PERMISSION_DENIED SERVICE_REQUIRED",
                    "PERMISSION_DENIED SERVICE_REQUIRED",
                    ok,
                    ok),
            "admin", List.of(role, ok, role, ok),
            "verified", List.of(ok, email, user, user),
            "user and admin", List.of(role, email, user, user),
            "undeclared", List.of(role, role, role, role));
    table.forEach(
        (method, verdicts) ->
            assertEquals(
                verdicts,
                List.of(
                    verdict(method, person),
                    verdict(method, unverifiedAdmin),
                    verdict(method, service),
                    verdict(method, serviceAdmin)),
                method));
    assertEquals("UNAUTHENTICATED TOKEN_MISSING", verdict("any"));
    assertEquals(role, verdict("undeclared"));
    assertEquals(ok, verdict("public", "Bearer nonsense"));
    assertEquals("UNAUTHENTICATED TOKEN_INVALID", verdict("service", "Bearer nonsense"));
  }

  @Test
  void onlyASingleBearerTokenCounts() {
    String token = minter.mint(Minter.person(Instant.now()));
    for (String good : List.of("Bearer " + token, "bEaReR   " + token)) {
      assertEquals("ACCEPTED", verdict("any", good));
    }
    for (String none : List.of("", "Basic YTpi", "Bearerx " + token, token)) {
      assertEquals("UNAUTHENTICATED TOKEN_MISSING", verdict("any", none));
    }
    for (String bad :
        List.of("Bearer", "Bearer ", "Bearer " + token + ",Bearer " + token, "Bearer\t" + token)) {
      String expected = bad.startsWith("Bearer\t") ? "TOKEN_MISSING" : "TOKEN_INVALID";
      assertEquals("UNAUTHENTICATED " + expected, verdict("any", bad));
    }
    assertEquals(
        "UNAUTHENTICATED TOKEN_INVALID", verdict("any", "Bearer " + token, "Bearer " + token));
    assertEquals("UNAUTHENTICATED TOKEN_INVALID", verdict("any", "Basic YTpi", "Bearer " + token));
    assertEquals("UNAUTHENTICATED TOKEN_INVALID", verdict("any", "Basic YTpi,Bearer " + token));
  }

  @Test
  void aStarStandsForOneSegmentThatMeansTheSameToEverybody() {
    assertEquals("ACCEPTED", verdict("DELETE /orders/1"));
    assertEquals("ACCEPTED", verdict("DELETE /orders/a.b~c_d-e"));
    for (String path :
        List.of("/", "/..", "/.", "/%2e%2e", "/1;x", "/1/2", "/1?x", "/1\\2", "", "//1")) {
      assertEquals("PERMISSION_DENIED ROLE_REQUIRED", verdict("DELETE /orders" + path), path);
    }
    assertEquals("PERMISSION_DENIED ROLE_REQUIRED", verdict("GET /orders/"));
    assertEquals("PERMISSION_DENIED ROLE_REQUIRED", verdict("get /orders"));
  }

  @Test
  void aPublicMethodCanAskForNothing() {
    assertThrows(IllegalArgumentException.class, () -> Demand.PUBLIC.withRole("admin"));
    assertThrows(IllegalArgumentException.class, Demand.PUBLIC::withVerifiedEmail);
  }
}
