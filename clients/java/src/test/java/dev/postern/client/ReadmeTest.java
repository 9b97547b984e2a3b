package dev.postern.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.postern.auth.v1.AuthServiceGrpc;
import dev.postern.auth.v1.GetMeRequest;
import dev.postern.auth.v1.LoginRequest;
import dev.postern.auth.v1.SignUpRequest;
import io.grpc.ManagedChannel;
import io.grpc.Status.Code;
import io.grpc.StatusRuntimeException;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Optional;
import java.util.Set;
import java.util.TreeSet;
import java.util.regex.Pattern;
import java.util.stream.Collectors;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;
import org.junit.jupiter.api.io.TempDir;

@Timeout(60)
class ReadmeTest {
  private static final Pattern SNIPPET =
      Pattern.compile("// README: (\\w+)\n(.*?)\n *// README: end", Pattern.DOTALL);
  private static final Pattern BLOCK = Pattern.compile("```java\n(.*?)\n```", Pattern.DOTALL);

  private static Set<String> find(Pattern pattern, int group, String text) {
    return pattern
        .matcher(text)
        .results()
        .map(found -> found.group(group).stripTrailing().stripIndent())
        .collect(Collectors.toCollection(TreeSet::new));
  }

  @Test
  void everyBlockOfTheReadmeIsCodeThatIsTested() throws Exception {
    String tested =
        Files.readString(Path.of("src/test/java/dev/postern/client/Snippets.java"))
            + Files.readString(
                Path.of("src/test/java/dev/postern/client/spring/ResourceServerTest.java"));
    assertEquals(find(SNIPPET, 2, tested), find(BLOCK, 1, Files.readString(Path.of("README.md"))));
  }

  @Test
  void theCodeOfTheReadmeWorks(@TempDir Path directory) throws Exception {
    ManagedChannel channel = Env.channel();
    Snippets snippets = new Snippets();
    var stub = AuthServiceGrpc.newBlockingStub(snippets.outgoing(channel));
    try {
      // A service has no account of its own.
      var thrown =
          assertThrows(
              StatusRuntimeException.class, () -> stub.getMe(GetMeRequest.getDefaultInstance()));
      assertEquals(Reason.USER_REQUIRED, PosternException.from(thrown).reason());

      Verifier verifier = snippets.verifier();
      Env.Person ada = Env.person();
      assertEquals(ada.id(), verifier.verify(ada.accessToken()).subject());
      snippets.feed.close();

      var server = snippets.grpcServer(verifier, new AuthServiceGrpc.AuthServiceImplBase() {});
      ManagedChannel own = Env.channelTo("127.0.0.1:" + server.getPort());
      var refused =
          assertThrows(
              StatusRuntimeException.class,
              () -> AuthServiceGrpc.newBlockingStub(own).login(LoginRequest.getDefaultInstance()));
      assertEquals(Reason.ROLE_REQUIRED, PosternException.from(refused).reason());
      own.shutdownNow();
      server.shutdownNow();

      var http = snippets.httpServer(verifier, exchange -> exchange.sendResponseHeaders(200, -1));
      var url = URI.create("http://127.0.0.1:" + http.getAddress().getPort() + "/healthz");
      var answer =
          HttpClient.newHttpClient()
              .send(HttpRequest.newBuilder(url).build(), HttpResponse.BodyHandlers.discarding());
      assertEquals(200, answer.statusCode());
      http.stop(0);

      var store = new Snippets.FileStore(directory.resolve("refresh-token"));
      assertEquals(Optional.empty(), store.load());
      store.save(ada.refreshToken());
      TokenSource.session(channel, store).token();
      assertTrue(store.load().filter(token -> !token.equals(ada.refreshToken())).isPresent());

      thrown =
          assertThrows(
              StatusRuntimeException.class,
              () ->
                  AuthServiceGrpc.newBlockingStub(channel)
                      .signUp(SignUpRequest.getDefaultInstance()));
      assertTrue(
          Snippets.explain(thrown).startsWith("please correct [FieldViolation[field=username"));
      var wrong = PosternException.refusal(Code.UNAUTHENTICATED, Reason.INVALID_CREDENTIALS, "");
      assertEquals("the email or the password is wrong", Snippets.explain(wrong));
      assertEquals(
          "gone", Snippets.explain(PosternException.refusal(Code.NOT_FOUND, "NEW_REASON", "gone")));
      assertEquals("please try again", Snippets.explain(FakePostern.failure(Code.UNAVAILABLE, "")));
    } finally {
      channel.shutdownNow();
      snippets.postern.shutdownNow();
    }
  }
}
