package dev.postern.client;

import com.sun.net.httpserver.HttpHandler;
import com.sun.net.httpserver.HttpServer;
import dev.postern.client.Verifier.WhenUnknown;
import io.grpc.Channel;
import io.grpc.ClientInterceptors;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.InsecureServerCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Server;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.net.InetSocketAddress;
import java.nio.file.Files;
import java.nio.file.NoSuchFileException;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.nio.file.attribute.PosixFilePermissions;
import java.time.Duration;
import java.util.Map;
import java.util.Optional;
import java.util.concurrent.TimeUnit;

/**
 * The code of README.md: what stands between the comments is there, word for word. ReadmeTest runs
 * it.
 */
final class Snippets {
  private final String posternAddress = Env.get("POSTERN_GRPC_ADDR");
  private final String clientId = Env.get("POSTERN_CLIENT_ID");
  private final String clientSecret = Env.get("POSTERN_CLIENT_SECRET");
  private final String issuer = Env.get("POSTERN_ISSUER");
  private final String audience = Env.get("POSTERN_AUDIENCE");

  ManagedChannel postern;
  TokenSource tokens;
  RevocationFeed feed;

  Channel outgoing(ManagedChannel channelToShop) {
    // README: outgoing
    // With TLS: TlsChannelCredentials.create()
    var credentials = InsecureChannelCredentials.create();
    ManagedChannel postern = Grpc.newChannelBuilder(posternAddress, credentials).build();
    TokenSource tokens = TokenSource.service(postern, clientId, clientSecret);

    Channel shop = ClientInterceptors.intercept(channelToShop, tokens.interceptor());
    // README: end
    this.postern = postern;
    this.tokens = tokens;
    return shop;
  }

  // README: store
  /** Keeps the refresh token in a file that only its owner can read. */
  record FileStore(Path file) implements RefreshTokenStore {
    @Override
    public Optional<String> load() {
      try {
        return Optional.of(Files.readString(file));
      } catch (NoSuchFileException none) {
        return Optional.empty();
      } catch (IOException failed) {
        throw new UncheckedIOException(failed);
      }
    }

    @Override
    public void save(String refreshToken) {
      try {
        var ownerOnly = PosixFilePermissions.fromString("rw-------");
        Path next = Path.of(file + ".next");
        Files.deleteIfExists(next);
        Files.createFile(next, PosixFilePermissions.asFileAttribute(ownerOnly));
        Files.writeString(next, refreshToken);
        Files.move(next, file, StandardCopyOption.ATOMIC_MOVE);
      } catch (IOException failed) {
        throw new UncheckedIOException(failed);
      }
    }
  }

  // README: end

  Verifier verifier() throws InterruptedException {
    // README: verifier
    RevocationState revocations = new RevocationState();
    RevocationFeed feed = RevocationFeed.start(postern, tokens, revocations);
    Verifier verifier =
        Verifier.builder(issuer, audience) // POSTERN_ISSUER and POSTERN_AUDIENCE of the server
            .revocations(revocations, WhenUnknown.REFUSE)
            .build();
    boolean isReady = revocations.awaitComplete(Duration.ofSeconds(30));
    // README: end
    this.feed = feed;
    if (!isReady) {
      throw new AssertionError("not ready");
    }
    return verifier;
  }

  Server grpcServer(Verifier verifier, io.grpc.BindableService authService) throws IOException {
    // README: grpc
    Demands demands =
        new Demands(
            verifier,
            Map.of(
                "postern.auth.v1.AuthService/GetMe", Demand.USER.withVerifiedEmail(),
                "postern.auth.v1.TokenService/*", Demand.SERVICE.withRole("billing"),
                "grpc.health.v1.Health/Check", Demand.PUBLIC));
    Server server =
        Grpc.newServerBuilderForPort(0, InsecureServerCredentials.create())
            .addService(authService) // its methods call CallerContext.current()
            .intercept(new PosternServerInterceptor(demands))
            .build()
            .start();
    // README: end
    return server;
  }

  HttpServer httpServer(Verifier verifier, HttpHandler handler) throws IOException {
    // README: http
    Demands demands =
        new Demands(
            verifier,
            Map.of(
                "GET /orders", Demand.AUTHENTICATED,
                "DELETE /orders/*", Demand.AUTHENTICATED.withRole("admin"),
                "GET /healthz", Demand.PUBLIC));
    HttpServer server = HttpServer.create(new InetSocketAddress("127.0.0.1", 0), 0);
    server.createContext("/", handler).getFilters().add(new PosternFilter(demands));
    server.start();
    // README: end
    return server;
  }

  // README: errors
  static String explain(Throwable thrown) throws InterruptedException {
    PosternException failure = PosternException.from(thrown);
    switch (failure.reason()) {
      case Reason.INVALID_FIELD:
        return "please correct " + failure.fieldViolations();
      case Reason.INVALID_CREDENTIALS:
        return "the email or the password is wrong";
      default:
        // Also a reason that is newer than the library.
        if (failure.isTransient()) {
          TimeUnit.MILLISECONDS.sleep(failure.retryDelay().orElse(Duration.ZERO).toMillis());
          return "please try again";
        }
        return failure.getMessage();
    }
  }
  // README: end
}
