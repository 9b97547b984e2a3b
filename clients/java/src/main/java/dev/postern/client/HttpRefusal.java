package dev.postern.client;

import com.nimbusds.jose.util.JSONObjectUtils;
import io.grpc.Status.Code;
import java.nio.charset.StandardCharsets;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;

/** A refusal as an HTTP response: the status, the headers, and the body of AIP-193. */
record HttpRefusal(int status, Map<String, String> headers, byte[] body) {
  static HttpRefusal of(PosternException refused) {
    int status =
        switch (refused.code()) {
          case UNAUTHENTICATED -> 401;
          case PERMISSION_DENIED -> 403;
          case UNAVAILABLE -> 503;
          default -> 500;
        };
    Map<String, String> headers = new TreeMap<>(Map.of("Content-Type", "application/json"));
    if (refused.code() == Code.UNAUTHENTICATED) {
      boolean hadToken = !refused.reason().equals(Reason.TOKEN_MISSING);
      headers.put("WWW-Authenticate", hadToken ? "Bearer error=\"invalid_token\"" : "Bearer");
    } else if (refused.code() == Code.PERMISSION_DENIED) {
      headers.put("WWW-Authenticate", "Bearer error=\"insufficient_scope\"");
    }
    refused
        .retryDelay()
        .ifPresent(delay -> headers.put("Retry-After", Long.toString(delay.toSeconds())));
    Map<String, Object> info =
        Map.of(
            "@type",
            "type.googleapis.com/google.rpc.ErrorInfo",
            "domain",
            PosternException.DOMAIN,
            "metadata",
            Map.of(),
            "reason",
            refused.reason());
    Map<String, Object> error =
        Map.of(
            "code", status,
            "details", List.of(info),
            "message", refused.getMessage(),
            "status", refused.code().name());
    String body = JSONObjectUtils.toJSONString(Map.of("error", error));
    return new HttpRefusal(status, headers, body.getBytes(StandardCharsets.UTF_8));
  }
}
