package dev.postern.client;

import com.sun.net.httpserver.Filter;
import com.sun.net.httpserver.HttpExchange;
import java.io.IOException;

/**
 * Lets the requests of the JDK's HTTP server through that its {@link Demands} allow, and puts the
 * caller into {@link CallerContext}: {@code context.getFilters().add(…)}. (The attributes of an
 * exchange are no place for a caller: in Java 17 all requests of a context share them.)
 */
public final class PosternFilter extends Filter {
  private final Demands demands;

  /** A filter whose demands name methods as {@code GET /orders}. */
  public PosternFilter(Demands demands) {
    this.demands = demands;
  }

  @Override
  public void doFilter(HttpExchange exchange, Chain chain) throws IOException {
    Caller caller;
    try {
      String method = exchange.getRequestMethod() + " " + exchange.getRequestURI().getRawPath();
      caller =
          demands.check(method, exchange.getRequestHeaders().get("Authorization")).orElse(null);
    } catch (PosternException refused) {
      answer(exchange, HttpRefusal.of(refused));
      return;
    }
    try {
      CallerContext.call(
          caller,
          () -> {
            chain.doFilter(exchange);
            return null;
          });
    } catch (IOException | RuntimeException thrown) {
      throw thrown;
    } catch (Exception impossible) {
      throw new IllegalStateException(impossible);
    }
  }

  private static void answer(HttpExchange exchange, HttpRefusal refusal) throws IOException {
    try (exchange) {
      refusal.headers().forEach(exchange.getResponseHeaders()::set);
      boolean hasBody = !exchange.getRequestMethod().equals("HEAD");
      exchange.sendResponseHeaders(refusal.status(), hasBody ? refusal.body().length : -1);
      if (hasBody) {
        exchange.getResponseBody().write(refusal.body());
      }
    }
  }

  @Override
  public String description() {
    return "Postern: who may call";
  }
}
