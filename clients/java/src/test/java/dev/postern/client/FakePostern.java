package dev.postern.client;

import dev.postern.auth.v1.AuthServiceGrpc;
import dev.postern.auth.v1.GetMeRequest;
import dev.postern.auth.v1.GetMeResponse;
import dev.postern.auth.v1.IssueServiceTokenRequest;
import dev.postern.auth.v1.IssueServiceTokenResponse;
import dev.postern.auth.v1.LoginRequest;
import dev.postern.auth.v1.LoginResponse;
import dev.postern.auth.v1.RefreshRequest;
import dev.postern.auth.v1.RefreshResponse;
import dev.postern.auth.v1.TokenPair;
import dev.postern.auth.v1.TokenServiceGrpc;
import dev.postern.auth.v1.WatchRevocationsRequest;
import dev.postern.auth.v1.WatchRevocationsResponse;
import io.grpc.BindableService;
import io.grpc.Context;
import io.grpc.Contexts;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.Server;
import io.grpc.ServerCall;
import io.grpc.ServerCallHandler;
import io.grpc.ServerInterceptor;
import io.grpc.Status;
import io.grpc.inprocess.InProcessChannelBuilder;
import io.grpc.inprocess.InProcessServerBuilder;
import io.grpc.stub.StreamObserver;
import java.io.IOException;
import java.time.Clock;
import java.util.List;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.CopyOnWriteArrayList;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.TimeUnit;
import java.util.function.Supplier;

/** A Postern in memory. It refuses what it is told to refuse, and records what it was asked. */
final class FakePostern implements AutoCloseable {
  private static final Context.Key<String> AUTHORIZATION = Context.key("authorization");

  final Minter minter = new Minter("k");
  final List<String> calls = new CopyOnWriteArrayList<>();

  /** What each call does before it answers, in order: a runnable that throws is the answer. */
  final BlockingQueue<Runnable> before = new LinkedBlockingQueue<>();

  /** The streams that were begun. */
  final BlockingQueue<Watch> watches = new LinkedBlockingQueue<>();

  volatile Supplier<Runnable> always = () -> () -> {};

  private final Clock clock;
  private final String name = InProcessServerBuilder.generateName();
  private final Server server;
  private volatile String validRefreshToken = "";
  private int refreshTokens;

  /** A stream of revocations. */
  record Watch(String cursor, String authorization, StreamObserver<WatchRevocationsResponse> out) {
    void send(WatchRevocationsResponse message, String itsCursor) {
      out.onNext(message.toBuilder().setCursor(itsCursor).build());
    }
  }

  FakePostern(Clock clock) {
    this.clock = clock;
    var builder = InProcessServerBuilder.forName(name).intercept(new Recorder());
    for (BindableService service : List.of(new Auth(), new Tokens())) {
      builder.addService(service);
    }
    try {
      server = builder.build().start();
    } catch (IOException impossible) {
      throw new AssertionError(impossible);
    }
  }

  ManagedChannel channel() {
    return InProcessChannelBuilder.forName(name).build();
  }

  Watch nextWatch() throws InterruptedException {
    Watch watch = watches.poll(10, TimeUnit.SECONDS);
    if (watch == null) {
      throw new AssertionError("no stream was begun");
    }
    return watch;
  }

  static RuntimeException failure(Status.Code code, String reason) {
    return PosternException.refusal(code, reason, "told to").toStatusException();
  }

  void failNext(Status.Code code, String reason) {
    before.add(
        () -> {
          throw failure(code, reason);
        });
  }

  @Override
  public void close() {
    server.shutdownNow();
  }

  private <T> void answer(StreamObserver<T> out, String call, Supplier<T> answer) {
    calls.add(call);
    try {
      Runnable first = before.poll();
      T made = answer.get();
      (first == null ? always.get() : first).run();
      out.onNext(made);
      out.onCompleted();
    } catch (RuntimeException told) {
      out.onError(told);
    }
  }

  /** As the server does: the one before works again, as long as nobody has used its answer. */
  private synchronized TokenPair pair() {
    validRefreshToken = "refresh-" + ++refreshTokens;
    return TokenPair.newBuilder()
        .setAccessToken(minter.mint(Minter.person(clock.instant())))
        .setRefreshToken(validRefreshToken)
        .build();
  }

  private final class Auth extends AuthServiceGrpc.AuthServiceImplBase {
    private String lastPresented = "";
    private TokenPair lastAnswer;

    @Override
    public void login(LoginRequest request, StreamObserver<LoginResponse> out) {
      answer(
          out,
          "login " + request.getPassword(),
          () -> LoginResponse.newBuilder().setTokens(pair()).build());
    }

    @Override
    public void getMe(GetMeRequest request, StreamObserver<GetMeResponse> out) {
      answer(out, "me " + AUTHORIZATION.get(), GetMeResponse::getDefaultInstance);
    }

    @Override
    public synchronized void refresh(RefreshRequest request, StreamObserver<RefreshResponse> out) {
      String presented = request.getRefreshToken();
      answer(
          out,
          "refresh " + presented,
          () -> {
            if (presented.equals(validRefreshToken)) {
              lastAnswer = pair();
            } else if (!presented.equals(lastPresented)) {
              throw failure(Status.Code.UNAUTHENTICATED, Reason.REFRESH_TOKEN_INVALID);
            }
            lastPresented = presented;
            return RefreshResponse.newBuilder().setTokens(lastAnswer).build();
          });
    }
  }

  private final class Tokens extends TokenServiceGrpc.TokenServiceImplBase {
    @Override
    public void issueServiceToken(
        IssueServiceTokenRequest request, StreamObserver<IssueServiceTokenResponse> out) {
      answer(
          out,
          "issue " + request.getClientId(),
          () ->
              IssueServiceTokenResponse.newBuilder()
                  .setAccessToken(minter.mint(Minter.service(clock.instant())))
                  .build());
    }

    @Override
    public void watchRevocations(
        WatchRevocationsRequest request, StreamObserver<WatchRevocationsResponse> out) {
      watches.add(new Watch(request.getResumeCursor(), AUTHORIZATION.get(), out));
    }
  }

  private static final class Recorder implements ServerInterceptor {
    @Override
    public <Q, A> ServerCall.Listener<Q> interceptCall(
        ServerCall<Q, A> call, Metadata headers, ServerCallHandler<Q, A> next) {
      Context context =
          Context.current().withValue(AUTHORIZATION, headers.get(Bearer.AUTHORIZATION));
      return Contexts.interceptCall(context, call, headers, next);
    }
  }
}
