package dev.postern.client;

import dev.postern.auth.v1.AuthServiceGrpc;
import dev.postern.auth.v1.IssueServiceTokenRequest;
import dev.postern.auth.v1.LoginRequest;
import dev.postern.auth.v1.RefreshRequest;
import dev.postern.auth.v1.TokenPair;
import dev.postern.auth.v1.TokenServiceGrpc;
import io.grpc.Channel;
import java.util.Optional;
import java.util.concurrent.TimeUnit;
import java.util.function.Supplier;

/**
 * What an access token is exchanged for: each supplier makes one try, and throws what the stub
 * throws.
 */
final class Grants {
  private static final long DEADLINE_SECONDS = 10;

  private Grants() {}

  /** The credentials of a service account (RFC 6749, section 4.4). */
  static Supplier<String> service(Channel channel, String clientId, String clientSecret) {
    var request =
        IssueServiceTokenRequest.newBuilder()
            .setClientId(clientId)
            .setClientSecret(clientSecret)
            .build();
    var stub = TokenServiceGrpc.newBlockingStub(channel);
    return () ->
        stub.withDeadlineAfter(DEADLINE_SECONDS, TimeUnit.SECONDS)
            .issueServiceToken(request)
            .getAccessToken();
  }

  /**
   * The refresh token of the store; a login, if there is one, when there is no such token or it is
   * not valid any more.
   */
  static Supplier<String> session(
      Channel channel, RefreshTokenStore store, Optional<LoginRequest> login) {
    var stub = AuthServiceGrpc.newBlockingStub(channel);
    return () -> {
      var calls = stub.withDeadlineAfter(DEADLINE_SECONDS, TimeUnit.SECONDS);
      Optional<String> refreshToken = store.load();
      if (refreshToken.isPresent()) {
        var request = RefreshRequest.newBuilder().setRefreshToken(refreshToken.get()).build();
        try {
          return keep(calls.refresh(request).getTokens(), store);
        } catch (io.grpc.StatusRuntimeException failure) {
          boolean isOver =
              PosternException.from(failure).reason().equals(Reason.REFRESH_TOKEN_INVALID);
          if (!isOver || login.isEmpty()) {
            throw failure;
          }
        }
      }
      LoginRequest credentials = login.orElseThrow(() -> noToken());
      return keep(calls.login(credentials).getTokens(), store);
    };
  }

  /**
   * The new refresh token is stored before anybody has the access token: using that ends the old
   * refresh token.
   */
  private static String keep(TokenPair tokens, RefreshTokenStore store) {
    store.save(tokens.getRefreshToken());
    return tokens.getAccessToken();
  }

  private static PosternException noToken() {
    return Verifier.unauthenticated(Reason.REFRESH_TOKEN_INVALID, "there is no refresh token");
  }
}
