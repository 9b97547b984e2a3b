package dev.postern.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;

import dev.postern.auth.v1.AuthServiceGrpc;
import dev.postern.auth.v1.GetMeRequest;
import dev.postern.auth.v1.GetMeResponse;
import dev.postern.auth.v1.LoginRequest;
import dev.postern.auth.v1.LoginResponse;
import dev.postern.auth.v1.LogoutRequest;
import dev.postern.auth.v1.TokenServiceGrpc;
import dev.postern.auth.v1.User;
import dev.postern.auth.v1.WatchRevocationsRequest;
import dev.postern.auth.v1.WatchRevocationsResponse;
import dev.postern.client.Verifier.WhenUnknown;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.Server;
import io.grpc.StatusRuntimeException;
import io.grpc.inprocess.InProcessChannelBuilder;
import io.grpc.inprocess.InProcessServerBuilder;
import io.grpc.stub.MetadataUtils;
import io.grpc.stub.StreamObserver;
import java.time.Instant;
import java.util.Map;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;

class PosternServerInterceptorTest {
  private final Minter minter = new Minter("k");
  private final RevocationState state = new RevocationState();
  private final String name = InProcessServerBuilder.generateName();
  private final ManagedChannel channel = InProcessChannelBuilder.forName(name).build();
  private Server server;

  @BeforeEach
  void start() throws Exception {
    Verifier verifier = minter.verifier().revocations(state, WhenUnknown.REFUSE).build();
    Demands demands =
        new Demands(
            verifier,
            Map.of(
                "postern.auth.v1.AuthService/GetMe", Demand.USER,
                "postern.auth.v1.AuthService/Login", Demand.PUBLIC,
                "postern.auth.v1.TokenService/*", Demand.SERVICE));
    server =
        InProcessServerBuilder.forName(name)
            .intercept(new PosternServerInterceptor(demands))
            .addService(new Auth())
            .addService(new Tokens())
            .build()
            .start();
    state.apply(Messages.heartbeat(Instant.now()));
  }

  @AfterEach
  void stop() {
    channel.shutdownNow();
    server.shutdownNow();
  }

  private AuthServiceGrpc.AuthServiceBlockingStub auth(String... authorization) {
    return AuthServiceGrpc.newBlockingStub(channel)
        .withInterceptors(MetadataUtils.newAttachHeadersInterceptor(headers(authorization)));
  }

  private static Metadata headers(String... authorization) {
    Metadata headers = new Metadata();
    for (String value : authorization) {
      headers.put(Bearer.AUTHORIZATION, value);
    }
    return headers;
  }

  private String person() {
    return "Bearer " + minter.mint(Minter.person(Instant.now()));
  }

  private static PosternException refusal(Runnable call) {
    return PosternException.from(assertThrows(StatusRuntimeException.class, call::run));
  }

  @Test
  void theCallerIsInTheContextOfTheMethod() {
    GetMeResponse me = auth(person()).getMe(GetMeRequest.getDefaultInstance());
    assertEquals("ada", me.getUser().getUsername());
  }

  @Test
  void aRefusalHasACodeAReasonAndAMessage() {
    PosternException refused = refusal(() -> auth().getMe(GetMeRequest.getDefaultInstance()));
    assertEquals("UNAUTHENTICATED", refused.code().name());
    assertEquals("TOKEN_MISSING", refused.reason());
    assertEquals("this call needs an access token", refused.getMessage());
    String twice = person();
    refused = refusal(() -> auth(twice, twice).getMe(GetMeRequest.getDefaultInstance()));
    assertEquals("TOKEN_INVALID", refused.reason());
    String service = "Bearer " + minter.mint(Minter.service(Instant.now()));
    refused = refusal(() -> auth(service).getMe(GetMeRequest.getDefaultInstance()));
    assertEquals("PERMISSION_DENIED USER_REQUIRED", refused.code() + " " + refused.reason());
  }

  @Test
  void aMethodThatIsNotDeclaredIsRefusedForEverybody() {
    PosternException refused =
        refusal(() -> auth(person()).logout(LogoutRequest.getDefaultInstance()));
    assertEquals("PERMISSION_DENIED ROLE_REQUIRED", refused.code() + " " + refused.reason());
  }

  @Test
  void aPublicMethodIgnoresTokensAndKnowsNobody() {
    assertEquals(
        "nobody",
        auth("Bearer x").login(LoginRequest.getDefaultInstance()).getUser().getUsername());
  }

  @Test
  void aStreamingMethodIsProtectedToo() {
    String service = "Bearer " + minter.mint(Minter.service(Instant.now()));
    assertEquals("shop", watch(service));
    assertEquals("SERVICE_REQUIRED", refusal(() -> watch(person())).reason());
    assertEquals("TOKEN_MISSING", refusal(this::watch).reason());
  }

  private String watch(String... authorization) {
    return TokenServiceGrpc.newBlockingStub(channel)
        .withInterceptors(MetadataUtils.newAttachHeadersInterceptor(headers(authorization)))
        .watchRevocations(WatchRevocationsRequest.getDefaultInstance())
        .next()
        .getCursor();
  }

  private static final class Auth extends AuthServiceGrpc.AuthServiceImplBase {
    @Override
    public void getMe(GetMeRequest request, StreamObserver<GetMeResponse> out) {
      User user = User.newBuilder().setUsername(CallerContext.current().username()).build();
      out.onNext(GetMeResponse.newBuilder().setUser(user).build());
      out.onCompleted();
    }

    @Override
    public void login(LoginRequest request, StreamObserver<LoginResponse> out) {
      assertThrows(IllegalStateException.class, CallerContext::current);
      out.onNext(
          LoginResponse.newBuilder().setUser(User.newBuilder().setUsername("nobody")).build());
      out.onCompleted();
    }
  }

  private static final class Tokens extends TokenServiceGrpc.TokenServiceImplBase {
    @Override
    public void watchRevocations(
        WatchRevocationsRequest request, StreamObserver<WatchRevocationsResponse> out) {
      out.onNext(
          WatchRevocationsResponse.newBuilder()
              .setCursor(CallerContext.current().username())
              .build());
      out.onCompleted();
    }
  }
}
