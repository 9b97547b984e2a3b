package dev.postern.client.spring;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.postern.client.Env;
import dev.postern.client.Keys;
import dev.postern.client.Messages;
import dev.postern.client.Minter;
import dev.postern.client.RevocationState;
import dev.postern.client.Verifier;
import dev.postern.client.Verifier.WhenUnknown;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.time.Instant;
import java.util.List;
import java.util.Map;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.Test;
import org.springframework.boot.SpringApplication;
import org.springframework.boot.SpringBootConfiguration;
import org.springframework.boot.autoconfigure.EnableAutoConfiguration;
import org.springframework.context.ConfigurableApplicationContext;
import org.springframework.context.annotation.Bean;
import org.springframework.context.annotation.Configuration;
import org.springframework.context.annotation.Import;
import org.springframework.security.access.prepost.PreAuthorize;
import org.springframework.security.config.annotation.method.configuration.EnableMethodSecurity;
import org.springframework.security.core.annotation.AuthenticationPrincipal;
import org.springframework.security.oauth2.jwt.BadJwtException;
import org.springframework.security.oauth2.jwt.Jwt;
import org.springframework.security.oauth2.jwt.JwtDecoder;
import org.springframework.security.oauth2.server.resource.authentication.JwtAuthenticationConverter;
import org.springframework.web.bind.annotation.GetMapping;
import org.springframework.web.bind.annotation.RestController;

/** Resource servers with the current Spring Boot, as its users write them. */
class ResourceServerTest {
  private static final HttpClient HTTP = HttpClient.newHttpClient();
  private static RevocationState state;
  private ConfigurableApplicationContext app;

  /** Nothing of ours. */
  @SpringBootConfiguration(proxyBeanMethods = false)
  @EnableAutoConfiguration
  @EnableMethodSecurity
  @Import(Pages.class)
  static class Plain {}

  /** With our two beans. */
  @SpringBootConfiguration(proxyBeanMethods = false)
  @EnableAutoConfiguration
  @EnableMethodSecurity
  @Import({Pages.class, Beans.class})
  static class WithPostern {}

  @Configuration(proxyBeanMethods = false)
  static class Beans {
    private final Verifier verifier =
        Verifier.builder(Env.get("POSTERN_ISSUER"), Env.get("POSTERN_AUDIENCE"))
            .revocations(state, WhenUnknown.REFUSE)
            .build();

    // README: spring
    @Bean
    JwtDecoder jwtDecoder() {
      return new PosternJwtDecoder(
          verifier); // or PosternJwtDecoder.ofIssuer("https://auth.example.com")
    }

    @Bean
    JwtAuthenticationConverter jwtAuthenticationConverter() {
      return PosternJwtDecoder.authenticationConverter();
    }
    // README: end
  }

  @RestController
  static class Pages {
    @GetMapping("/me")
    String me(@AuthenticationPrincipal Jwt jwt) {
      return jwt.getSubject();
    }

    @GetMapping("/admin")
    @PreAuthorize("hasRole('admin')")
    String admin() {
      return "the back office";
    }
  }

  private void start(Class<?> configuration, String... properties) {
    state = new RevocationState();
    SpringApplication application = new SpringApplication(configuration);
    application.setDefaultProperties(
        Map.of("server.port", "0", "spring.main.banner-mode", "off", "logging.level.root", "WARN"));
    app = application.run(properties);
  }

  @AfterEach
  void stop() {
    if (app != null) {
      app.close();
    }
  }

  private HttpResponse<String> get(String path, String token) throws Exception {
    String port = app.getEnvironment().getProperty("local.server.port");
    HttpRequest request =
        HttpRequest.newBuilder(URI.create("http://127.0.0.1:" + port + path))
            .header("Authorization", "Bearer " + token)
            .build();
    return HTTP.send(request, HttpResponse.BodyHandlers.ofString());
  }

  private static String challenge(HttpResponse<String> answer) {
    return answer.headers().firstValue("WWW-Authenticate").orElse("");
  }

  @Test
  void withOurDecoderTokensAreAcceptedAndRolesAreAuthorities() throws Exception {
    start(WithPostern.class);
    state.apply(Messages.heartbeat(Instant.now()));
    Env.Person ada = Env.person();
    HttpResponse<String> me = get("/me", ada.accessToken());
    assertEquals(200, me.statusCode(), challenge(me));
    assertEquals(ada.id(), me.body());
    assertEquals(403, get("/admin", ada.accessToken()).statusCode());
    assertEquals("the back office", get("/admin", Env.person("admin").accessToken()).body());

    state.apply(Messages.roles(ada.id(), Instant.now().plusSeconds(900), false, "user", "admin"));
    assertEquals(
        200, get("/admin", ada.accessToken()).statusCode(), "the role that the person has now");
    state.apply(Messages.roles(ada.id(), Instant.now().plusSeconds(900), true));
    HttpResponse<String> refused = get("/me", ada.accessToken());
    assertEquals(401, refused.statusCode());
    assertTrue(challenge(refused).contains("error=\"invalid_token\""), challenge(refused));
    assertTrue(challenge(refused).contains("the session has ended"), challenge(refused));
    assertEquals(401, get("/me", "nonsense").statusCode());
  }

  @Test
  void whenRevocationsAreUnknownItIsUnavailable() throws Exception {
    start(WithPostern.class);
    HttpResponse<String> answer = get("/me", Env.person().accessToken());
    assertEquals(503, answer.statusCode());
    assertTrue(challenge(answer).contains("revocations unknown"), challenge(answer));
  }

  /** What Spring Boot 4.1 does with {@code issuer-uri} alone. README.md tells it. */
  @Test
  void withTheIssuerAloneSpringBootRefusesEveryToken() throws Exception {
    start(
        Plain.class,
        "--spring.security.oauth2.resourceserver.jwt.issuer-uri=" + Env.get("POSTERN_ISSUER"));
    HttpResponse<String> answer = get("/me", Env.person().accessToken());
    assertEquals(401, answer.statusCode());
    assertTrue(challenge(answer).startsWith("Bearer error=\"invalid_token\""), challenge(answer));
    String message =
        "An error occurred while attempting to decode the Jwt: the given typ value needs to be one of [JWT]";
    assertTrue(challenge(answer).contains(message), challenge(answer));
  }

  @Test
  void theIssuerAloneIsEnoughForOurDecoder() throws Exception {
    Minter minter = new Minter("k");
    var server =
        com.sun.net.httpserver.HttpServer.create(
            new java.net.InetSocketAddress(java.net.InetAddress.getLoopbackAddress(), 0), 0);
    byte[] keys = minter.jwks().toString().getBytes(java.nio.charset.StandardCharsets.UTF_8);
    server.createContext(
        "/.well-known/jwks.json",
        exchange -> {
          exchange.sendResponseHeaders(200, keys.length);
          exchange.getResponseBody().write(keys);
          exchange.close();
        });
    server.start();
    try {
      String issuer = "http://127.0.0.1:" + server.getAddress().getPort();
      var claims = Minter.person(Instant.now());
      claims.put("iss", issuer);
      Jwt jwt = PosternJwtDecoder.ofIssuer(issuer).decode(minter.mint(claims));
      assertEquals(claims.get("sub"), jwt.getSubject());
      assertEquals(issuer, jwt.getIssuer().toString());
      assertEquals(List.of("postern"), jwt.getAudience());
      assertEquals(900, jwt.getExpiresAt().getEpochSecond() - jwt.getIssuedAt().getEpochSecond());
      assertEquals("at+jwt", jwt.getHeaders().get("typ"));
      claims.put("aud", "elsewhere");
      String other = minter.mint(claims);
      assertThrows(BadJwtException.class, () -> PosternJwtDecoder.ofIssuer(issuer).decode(other));
      JwtDecoder unreachable =
          new PosternJwtDecoder(
              Verifier.builder(issuer, "postern")
                  .keys(Keys.at(URI.create("http://127.0.0.1:1/")))
                  .build());
      assertThrows(
          org.springframework.security.oauth2.core.OAuth2AuthenticationException.class,
          () -> unreachable.decode(other));
    } finally {
      server.stop(0);
    }
  }
}
