package dev.postern.client;

import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.regex.Pattern;

/**
 * What each method of a server wants, by its name. A gRPC method is named {@code
 * orders.v1.Orders/Create}, and an HTTP method {@code POST /orders}; {@code DELETE /orders/*}
 * stands for every path with one more segment of letters, digits and {@code -._~}, except dots
 * alone. A method that is not named is refused for everybody.
 */
public final class Demands {
  /**
   * Nothing that one program reads as a separator, or as the folder above, and another one does
   * not.
   */
  private static final Pattern SEGMENT = Pattern.compile("(?!\\.+$)[A-Za-z0-9._~-]+");

  private final Verifier verifier;
  private final Map<String, Demand> byMethod;

  /** These demands, of callers whom this verifier knows. */
  public Demands(Verifier verifier, Map<String, Demand> byMethod) {
    this.verifier = verifier;
    this.byMethod = Map.copyOf(byMethod);
  }

  /**
   * Decides about a call.
   *
   * @param method its name
   * @param authorization all values of {@code authorization}; null stands for none
   * @return the caller; empty if the method is public
   * @throws PosternException who may not call: UNAUTHENTICATED, PERMISSION_DENIED or UNAVAILABLE
   */
  public Optional<Caller> check(String method, Iterable<String> authorization) {
    Demand demand = demandOf(method);
    if (demand.kind() == Demand.Kind.PUBLIC) {
      return Optional.empty();
    }
    Caller caller = verifier.verify(bearerToken(authorization));
    demand.check(caller);
    return Optional.of(caller);
  }

  private Demand demandOf(String method) {
    Demand demand = byMethod.get(method);
    int segment = method.lastIndexOf('/') + 1;
    if (demand == null && SEGMENT.matcher(method.substring(segment)).matches()) {
      demand = byMethod.get(method.substring(0, segment) + "*");
    }
    if (demand == null) {
      throw Demand.denied(Reason.ROLE_REQUIRED, "nobody may call this: it is not declared who may");
    }
    return demand;
  }

  /**
   * The token of the one value {@code Bearer <token>} (RFC 6750, section 2.1). Another scheme
   * counts as no token. Two values, also if a proxy has joined them, are invalid, because it is
   * unclear which one is meant.
   */
  static String bearerToken(Iterable<String> authorization) {
    var values = (authorization == null ? List.<String>of() : authorization).iterator();
    String value = values.hasNext() ? values.next() : "";
    if (values.hasNext() || value.indexOf(',') >= 0) {
      throw Verifier.invalid();
    }
    int space = value.indexOf(' ');
    String scheme = space < 0 ? value : value.substring(0, space);
    if (!scheme.equalsIgnoreCase("Bearer")) {
      throw Verifier.unauthenticated(Reason.TOKEN_MISSING, "this call needs an access token");
    }
    return value.substring(scheme.length()).replaceFirst("^ +", "");
  }
}
