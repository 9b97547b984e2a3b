package dev.postern.client;

import io.grpc.CallCredentials;
import io.grpc.CallOptions;
import io.grpc.Channel;
import io.grpc.ClientCall;
import io.grpc.ClientInterceptor;
import io.grpc.ForwardingClientCall.SimpleForwardingClientCall;
import io.grpc.ForwardingClientCallListener.SimpleForwardingClientCallListener;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.Status;
import io.grpc.Status.Code;
import java.util.Set;
import java.util.concurrent.Executor;

/**
 * The credentials of one gRPC call. They know which token the call has, in case the server refuses
 * it.
 */
final class Bearer extends CallCredentials {
  static final Metadata.Key<String> AUTHORIZATION =
      Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER);

  /** After these another token may be accepted. */
  private static final Set<String> REFUSALS = Set.of(Reason.TOKEN_EXPIRED, Reason.SESSION_REVOKED);

  private final TokenSource source;
  private volatile AccessToken token;

  Bearer(TokenSource source) {
    this.source = source;
  }

  @Override
  public void applyRequestMetadata(RequestInfo call, Executor executor, MetadataApplier applier) {
    source.tokenAsync().whenComplete((valid, failed) -> apply(valid, failed, applier));
  }

  private void apply(AccessToken valid, Throwable failed, MetadataApplier applier) {
    if (failed == null) {
      token = valid;
      Metadata metadata = new Metadata();
      metadata.put(AUTHORIZATION, "Bearer " + valid.value());
      applier.apply(metadata);
    } else {
      PosternException why = PosternException.from(failed);
      applier.fail(Status.fromCode(why.code()).withDescription(why.getMessage()).withCause(why));
    }
  }

  /**
   * The call has ended like this: the next one gets another token if this one is not accepted any
   * more.
   */
  void ended(PosternException failure) {
    AccessToken used = token;
    if (used != null
        && failure.code() == Code.UNAUTHENTICATED
        && REFUSALS.contains(failure.reason())) {
      source.invalidate(used);
    }
  }

  static ClientInterceptor interceptor(TokenSource source) {
    return new ClientInterceptor() {
      @Override
      public <Q, A> ClientCall<Q, A> interceptCall(
          MethodDescriptor<Q, A> method, CallOptions options, Channel next) {
        Bearer credentials = new Bearer(source);
        return new Call<>(
            next.newCall(method, options.withCallCredentials(credentials)), credentials);
      }
    };
  }

  private static final class Call<Q, A> extends SimpleForwardingClientCall<Q, A> {
    private final Bearer credentials;

    Call(ClientCall<Q, A> call, Bearer credentials) {
      super(call);
      this.credentials = credentials;
    }

    @Override
    public void start(Listener<A> listener, Metadata headers) {
      super.start(
          new SimpleForwardingClientCallListener<A>(listener) {
            @Override
            public void onClose(Status status, Metadata trailers) {
              if (status.getCode() == Code.UNAUTHENTICATED) {
                credentials.ended(PosternException.from(status.asRuntimeException(trailers)));
              }
              super.onClose(status, trailers);
            }
          },
          headers);
    }
  }
}
