package dev.postern.client;

import io.grpc.Context;
import io.grpc.Contexts;
import io.grpc.Metadata;
import io.grpc.ServerCall;
import io.grpc.ServerCallHandler;
import io.grpc.ServerInterceptor;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;

/**
 * Lets the calls of a gRPC server through that its {@link Demands} allow, and puts the caller into
 * {@link CallerContext}. Services for tools, such as health and reflection, have to be declared
 * too.
 */
public final class PosternServerInterceptor implements ServerInterceptor {
  private final Demands demands;

  /** An interceptor for all services of a server: {@code serverBuilder.intercept(…)}. */
  public PosternServerInterceptor(Demands demands) {
    this.demands = demands;
  }

  @Override
  public <Q, A> ServerCall.Listener<Q> interceptCall(
      ServerCall<Q, A> call, Metadata headers, ServerCallHandler<Q, A> next) {
    try {
      Caller caller =
          demands
              .check(
                  call.getMethodDescriptor().getFullMethodName(),
                  headers.getAll(Bearer.AUTHORIZATION))
              .orElse(null);
      return Contexts.interceptCall(
          Context.current().withValue(CallerContext.KEY, caller), call, headers, next);
    } catch (PosternException refused) {
      StatusRuntimeException answer = refused.toStatusException();
      Metadata trailers = answer.getTrailers();
      call.close(Status.fromThrowable(answer), trailers == null ? new Metadata() : trailers);
      return new ServerCall.Listener<>() {};
    }
  }
}
