package dev.postern.client;

import jakarta.servlet.FilterChain;
import jakarta.servlet.ServletException;
import jakarta.servlet.http.HttpFilter;
import jakarta.servlet.http.HttpServletRequest;
import jakarta.servlet.http.HttpServletResponse;
import java.io.IOException;

/**
 * Lets the requests of a servlet container through that its {@link Demands} allow. The caller is in
 * {@link CallerContext}, and in the attribute {@link #CALLER} of the request. It reads the path as
 * the client has sent it.
 */
public final class PosternServletFilter extends HttpFilter {
  /** The name of the attribute that has the {@link Caller}. */
  public static final String CALLER = Caller.class.getName();

  private static final long serialVersionUID = 1;

  private final transient Demands demands;

  /** A filter whose demands name methods as {@code GET /orders}. */
  public PosternServletFilter(Demands demands) {
    this.demands = demands;
  }

  @Override
  protected void doFilter(
      HttpServletRequest request, HttpServletResponse response, FilterChain chain)
      throws IOException, ServletException {
    Caller caller;
    try {
      Iterable<String> authorization = () -> request.getHeaders("Authorization").asIterator();
      caller =
          demands
              .check(request.getMethod() + " " + request.getRequestURI(), authorization)
              .orElse(null);
    } catch (PosternException refused) {
      HttpRefusal refusal = HttpRefusal.of(refused);
      response.setStatus(refusal.status());
      refusal.headers().forEach(response::setHeader);
      response.getOutputStream().write(refusal.body());
      return;
    }
    request.setAttribute(CALLER, caller);
    try {
      CallerContext.call(
          caller,
          () -> {
            chain.doFilter(request, response);
            return null;
          });
    } catch (IOException | ServletException | RuntimeException thrown) {
      throw thrown;
    } catch (Exception impossible) {
      throw new IllegalStateException(impossible);
    }
  }
}
