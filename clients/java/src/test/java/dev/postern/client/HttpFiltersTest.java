package dev.postern.client;

import static java.nio.charset.StandardCharsets.UTF_8;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.nimbusds.jose.util.JSONObjectUtils;
import com.sun.net.httpserver.HttpServer;
import dev.postern.client.Verifier.WhenUnknown;
import jakarta.servlet.http.HttpServlet;
import jakarta.servlet.http.HttpServletRequest;
import jakarta.servlet.http.HttpServletResponse;
import java.io.IOException;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.time.Instant;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.Executors;
import org.apache.catalina.Context;
import org.apache.catalina.startup.Tomcat;
import org.apache.tomcat.util.descriptor.web.FilterDef;
import org.apache.tomcat.util.descriptor.web.FilterMap;
import org.junit.jupiter.api.AfterAll;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.TestInstance;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

/**
 * Both filters answer alike: that of the JDK's HTTP server, and that of a servlet container
 * (Tomcat).
 */
@TestInstance(TestInstance.Lifecycle.PER_CLASS)
class HttpFiltersTest {
  private static final HttpClient HTTP = HttpClient.newHttpClient();

  private final Minter minter = new Minter("k");
  private final RevocationState state = new RevocationState();
  private final Demands demands =
      new Demands(
          minter.verifier().revocations(state, WhenUnknown.REFUSE).build(),
          Map.of(
              "GET /me", Demand.AUTHENTICATED,
              "GET /person", Demand.USER,
              "HEAD /person", Demand.USER,
              "GET /public", Demand.PUBLIC));
  private final Map<String, Integer> ports = new java.util.HashMap<>();
  private HttpServer jdk;
  private Tomcat tomcat;

  @BeforeAll
  void start() throws Exception {
    jdk = HttpServer.create(new InetSocketAddress(InetAddress.getLoopbackAddress(), 0), 0);
    jdk.setExecutor(Executors.newCachedThreadPool());
    jdk.createContext(
            "/",
            exchange -> {
              byte[] body = whoCalls().getBytes(UTF_8);
              exchange.sendResponseHeaders(200, body.length);
              exchange.getResponseBody().write(body);
              exchange.close();
            })
        .getFilters()
        .add(new PosternFilter(demands));
    jdk.start();
    ports.put("jdk", jdk.getAddress().getPort());

    tomcat = new Tomcat();
    tomcat.setBaseDir("target/tomcat");
    tomcat.setPort(0);
    Context context = tomcat.addContext("", null);
    Tomcat.addServlet(context, "who", new Who());
    context.addServletMapping("/*", "who");
    FilterDef filter = new FilterDef();
    filter.setFilterName("postern");
    filter.setFilter(new PosternServletFilter(demands));
    context.addFilterDef(filter);
    FilterMap all = new FilterMap();
    all.setFilterName("postern");
    all.addURLPattern("/*");
    context.addFilterMap(all);
    tomcat.start();
    ports.put("servlet", tomcat.getConnector().getLocalPort());
    state.apply(Messages.heartbeat(Instant.now()));
  }

  @AfterAll
  void stop() throws Exception {
    jdk.stop(0);
    tomcat.stop();
    tomcat.destroy();
  }

  private static String whoCalls() {
    try {
      Thread.sleep(5);
      return CallerContext.current().subject();
    } catch (IllegalStateException nobody) {
      return "nobody";
    } catch (InterruptedException interrupted) {
      throw new AssertionError(interrupted);
    }
  }

  private static final class Who extends HttpServlet {
    private static final long serialVersionUID = 1;

    @Override
    protected void doGet(HttpServletRequest request, HttpServletResponse response)
        throws IOException {
      Caller caller = (Caller) request.getAttribute(PosternServletFilter.CALLER);
      String said = whoCalls();
      assertEquals(said, caller == null ? "nobody" : caller.subject());
      response.getWriter().write(said);
    }
  }

  private CompletableFuture<HttpResponse<String>> send(
      String server, String method, String path, String... tokens) {
    HttpRequest.Builder request =
        HttpRequest.newBuilder(URI.create("http://127.0.0.1:" + ports.get(server) + path))
            .method(method, HttpRequest.BodyPublishers.noBody());
    for (String token : tokens) {
      request.header("Authorization", "Bearer " + token);
    }
    return HTTP.sendAsync(request.build(), HttpResponse.BodyHandlers.ofString());
  }

  private HttpResponse<String> get(String server, String path, String... tokens) {
    return send(server, "GET", path, tokens).join();
  }

  private static void assertRefused(
      HttpResponse<String> answer, int status, String reason, String challenge) {
    try {
      assertEquals(status, answer.statusCode());
      assertEquals(
          "application/json",
          answer.headers().firstValue("Content-Type").orElseThrow().split(";")[0]);
      assertEquals(challenge, answer.headers().firstValue("WWW-Authenticate").orElse(""));
      Map<String, Object> error =
          JSONObjectUtils.getJSONObject(JSONObjectUtils.parse(answer.body()), "error");
      assertEquals((long) status, error.get("code"));
      Map<?, ?> info = (Map<?, ?>) ((List<?>) error.get("details")).get(0);
      assertEquals("type.googleapis.com/google.rpc.ErrorInfo", info.get("@type"));
      assertEquals("postern.auth.v1", info.get("domain"));
      assertEquals(reason, info.get("reason"));
      assertEquals(Map.of(), info.get("metadata"));
      assertTrue(error.get("message") instanceof String);
      assertTrue(
          List.of("UNAUTHENTICATED", "PERMISSION_DENIED", "UNAVAILABLE")
              .contains(error.get("status")));
    } catch (java.text.ParseException malformed) {
      throw new AssertionError(answer.body(), malformed);
    }
  }

  @ParameterizedTest
  @ValueSource(strings = {"jdk", "servlet"})
  void callersAreLetInOrRefusedAsDocumented(String server) {
    String person = minter.mint(Minter.person(Instant.now()));
    String service = minter.mint(Minter.service(Instant.now()));
    assertEquals(200, get(server, "/person", person).statusCode());
    assertEquals("nobody", get(server, "/public").body());
    assertEquals("nobody", get(server, "/public", "nonsense").body());
    assertRefused(get(server, "/me"), 401, "TOKEN_MISSING", "Bearer");
    assertRefused(
        get(server, "/me", "nonsense"), 401, "TOKEN_INVALID", "Bearer error=\"invalid_token\"");
    assertRefused(
        get(server, "/me", person, person), 401, "TOKEN_INVALID", "Bearer error=\"invalid_token\"");
    var forbidden = "Bearer error=\"insufficient_scope\"";
    assertRefused(get(server, "/person", service), 403, "USER_REQUIRED", forbidden);
    assertRefused(get(server, "/undeclared", person), 403, "ROLE_REQUIRED", forbidden);
    assertRefused(get(server, "/me/", person), 403, "ROLE_REQUIRED", forbidden);
    assertEquals(401, send(server, "HEAD", "/person").join().statusCode());
  }

  @ParameterizedTest
  @ValueSource(strings = {"jdk", "servlet"})
  void whenRevocationsAreUnknownItIsUnavailable(String server) {
    String person = minter.mint(Minter.person(Instant.now()));
    state.apply(Messages.heartbeat(Instant.now().minusSeconds(60)));
    try {
      HttpResponse<String> answer = get(server, "/me", person);
      assertRefused(answer, 503, "STORE_UNAVAILABLE", "");
      assertEquals("1", answer.headers().firstValue("Retry-After").orElseThrow());
    } finally {
      state.apply(Messages.heartbeat(Instant.now()));
    }
  }

  @ParameterizedTest
  @ValueSource(strings = {"jdk", "servlet"})
  void callersWhoCallAtTheSameTimeAreNotMixedUp(String server) {
    List<CompletableFuture<HttpResponse<String>>> answers = new ArrayList<>();
    List<Object> subjects = new ArrayList<>();
    for (int i = 0; i < 200; i++) {
      var claims = Minter.person(Instant.now());
      subjects.add(claims.get("sub"));
      answers.add(send(server, "GET", "/me", minter.mint(claims)));
    }
    for (int i = 0; i < answers.size(); i++) {
      assertEquals(subjects.get(i), answers.get(i).join().body());
    }
  }
}
