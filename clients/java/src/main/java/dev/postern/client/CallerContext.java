package dev.postern.client;

import io.grpc.Context;
import java.util.concurrent.Callable;

/**
 * The caller of what this thread handles. The interceptor and the filters put it into the {@link
 * Context} of gRPC, also for HTTP. Take it before the work goes to another thread, or take the
 * context along: {@link Context#wrap(Runnable)}.
 */
public final class CallerContext {
  /** Null in a public method, and outside of calls. */
  static final Context.Key<Caller> KEY = Context.key("postern-caller");

  private CallerContext() {}

  /** The caller. It is an error to ask in a public method, or outside of a call. */
  public static Caller current() {
    Caller caller = KEY.get();
    if (caller == null) {
      throw new IllegalStateException(
          "there is no caller here: the method is public, or this is another thread");
    }
    return caller;
  }

  /** Runs this for the caller; null stands for nobody. */
  static <T> T call(Caller caller, Callable<T> handling) throws Exception {
    return Context.current().withValue(KEY, caller).call(handling);
  }
}
