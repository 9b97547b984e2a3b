package dev.postern.client;

import com.nimbusds.jose.util.JSONObjectUtils;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.util.Map;

/** The stage: a real server and what can be done to it. A test that needs it fails without it. */
public final class Env {
  private static final HttpClient HTTP = HttpClient.newHttpClient();

  private Env() {}

  public static String get(String name) {
    String value = System.getenv(name);
    if (value == null) {
      throw new AssertionError(name + " is not set: run this with tests/libraries/stage");
    }
    return value;
  }

  public static ManagedChannel channel() {
    return channelTo(get("POSTERN_GRPC_ADDR"));
  }

  public static ManagedChannel channelTo(String address) {
    return Grpc.newChannelBuilder(address, InsecureChannelCredentials.create()).build();
  }

  public static TokenSource service(ManagedChannel channel) {
    return TokenSource.service(channel, get("POSTERN_CLIENT_ID"), get("POSTERN_CLIENT_SECRET"));
  }

  public static Verifier.Builder verifier() {
    return Verifier.builder(get("POSTERN_ISSUER"), get("POSTERN_AUDIENCE"));
  }

  /** A new person, who is logged in. */
  public record Person(
      String id,
      String username,
      String email,
      String password,
      String accessToken,
      String refreshToken) {}

  public static Person person(String... roles) throws Exception {
    Map<String, Object> made =
        post("/accounts" + (roles.length == 0 ? "" : "?role=" + roles[0]), "");
    return new Person(
        (String) made.get("id"),
        (String) made.get("username"),
        (String) made.get("email"),
        (String) made.get("password"),
        (String) made.get("accessToken"),
        (String) made.get("refreshToken"));
  }

  public static void logOut(Person person) throws Exception {
    post("/logout", JSONObjectUtils.toJSONString(Map.of("refreshToken", person.refreshToken())));
  }

  public static Map<String, Object> post(String path, String body) throws Exception {
    HttpRequest request =
        HttpRequest.newBuilder(URI.create(get("POSTERN_STAGE") + path))
            .POST(HttpRequest.BodyPublishers.ofString(body))
            .build();
    HttpResponse<String> response = HTTP.send(request, HttpResponse.BodyHandlers.ofString());
    if (response.statusCode() != 200) {
      throw new AssertionError(path + " answers " + response.body());
    }
    return JSONObjectUtils.parse(response.body());
  }
}
