package dev.postern.client.spring;

import com.nimbusds.jwt.SignedJWT;
import dev.postern.client.Caller;
import dev.postern.client.PosternException;
import dev.postern.client.Verifier;
import io.grpc.Status.Code;
import java.text.ParseException;
import java.util.HashMap;
import java.util.Map;
import org.springframework.http.HttpStatus;
import org.springframework.security.oauth2.core.OAuth2AuthenticationException;
import org.springframework.security.oauth2.jwt.BadJwtException;
import org.springframework.security.oauth2.jwt.Jwt;
import org.springframework.security.oauth2.jwt.JwtDecoder;
import org.springframework.security.oauth2.jwt.MappedJwtClaimSetConverter;
import org.springframework.security.oauth2.server.resource.BearerTokenError;
import org.springframework.security.oauth2.server.resource.authentication.JwtAuthenticationConverter;
import org.springframework.security.oauth2.server.resource.authentication.JwtGrantedAuthoritiesConverter;

/**
 * A {@link JwtDecoder} that checks access tokens as {@link Verifier} does. Spring's own decoders
 * refuse them, because their {@code typ} is {@code at+jwt} (RFC 9068).
 */
public final class PosternJwtDecoder implements JwtDecoder {
  private static final MappedJwtClaimSetConverter CLAIMS =
      MappedJwtClaimSetConverter.withDefaults(Map.of());

  private final Verifier verifier;

  /** A decoder with this verifier, which may follow revocations. */
  public PosternJwtDecoder(Verifier verifier) {
    this.verifier = verifier;
  }

  /**
   * A decoder of tokens of this issuer for the audience {@code postern}, the default of a server.
   */
  public static PosternJwtDecoder ofIssuer(String issuer) {
    return new PosternJwtDecoder(Verifier.builder(issuer, "postern").build());
  }

  /**
   * Turns each role into an authority: {@code admin} into {@code ROLE_admin}, for {@code
   * hasRole("admin")}.
   */
  public static JwtAuthenticationConverter authenticationConverter() {
    JwtGrantedAuthoritiesConverter roles = new JwtGrantedAuthoritiesConverter();
    roles.setAuthoritiesClaimName("roles");
    roles.setAuthorityPrefix("ROLE_");
    JwtAuthenticationConverter converter = new JwtAuthenticationConverter();
    converter.setJwtGrantedAuthoritiesConverter(roles);
    return converter;
  }

  /**
   * The token. Its claim {@code roles} has the roles that the caller has now.
   *
   * @throws BadJwtException it is refused; Spring answers 401
   * @throws OAuth2AuthenticationException there are no keys, or revocations are unknown; Spring
   *     answers 503
   */
  @Override
  public Jwt decode(String token) {
    try {
      Caller caller = verifier.verify(token);
      SignedJWT parsed = SignedJWT.parse(token);
      Map<String, Object> claims =
          new HashMap<>(CLAIMS.convert(parsed.getJWTClaimsSet().getClaims()));
      claims.put("roles", caller.roles());
      return Jwt.withTokenValue(token)
          .headers(headers -> headers.putAll(parsed.getHeader().toJSONObject()))
          .claims(all -> all.putAll(claims))
          .build();
    } catch (PosternException refused) {
      if (refused.code() == Code.UNAVAILABLE) {
        throw new OAuth2AuthenticationException(
            new BearerTokenError(
                "temporarily_unavailable",
                HttpStatus.SERVICE_UNAVAILABLE,
                refused.getMessage(),
                null));
      }
      throw new BadJwtException(refused.getMessage(), refused);
    } catch (ParseException impossible) {
      throw new BadJwtException("the access token is invalid", impossible); // It was verified.
    }
  }
}
