package dev.postern.client;

import static java.nio.charset.StandardCharsets.UTF_8;

import com.nimbusds.jose.JOSEException;
import com.nimbusds.jose.JWSHeader;
import com.nimbusds.jose.crypto.ECDSASigner;
import com.nimbusds.jose.jwk.Curve;
import com.nimbusds.jose.jwk.ECKey;
import com.nimbusds.jose.jwk.JWKSet;
import com.nimbusds.jose.jwk.KeyUse;
import com.nimbusds.jose.jwk.gen.ECKeyGenerator;
import com.nimbusds.jose.util.Base64URL;
import com.nimbusds.jose.util.JSONObjectUtils;
import java.time.Instant;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.UUID;

/** Mints access tokens as Postern does, and others. */
public final class Minter {
  public static final String ISSUER = "http://issuer.example";
  public static final String AUDIENCE = "postern";

  final ECKey key;

  public Minter(String kid) {
    try {
      key = new ECKeyGenerator(Curve.P_256).keyID(kid).keyUse(KeyUse.SIGNATURE).generate();
    } catch (JOSEException impossible) {
      throw new AssertionError(impossible);
    }
  }

  public JWKSet jwks() {
    return new JWKSet(key.toPublicJWK());
  }

  Verifier.Builder verifier() {
    return Verifier.builder(ISSUER, AUDIENCE).keys(Keys.fixed(jwks()));
  }

  public static Map<String, Object> person(Instant now) {
    Map<String, Object> claims = common(now, UUID.randomUUID().toString());
    claims.putAll(Map.of("client_id", "postern", "subject_type", "user", "username", "ada"));
    claims.putAll(
        Map.of("email", "ada@example.com", "email_verified", true, "roles", List.of("user")));
    return claims;
  }

  public static Map<String, Object> service(Instant now, String... roles) {
    String id = UUID.randomUUID().toString();
    Map<String, Object> claims = common(now, id);
    claims.putAll(
        Map.of(
            "client_id",
            id,
            "subject_type",
            "service",
            "username",
            "shop",
            "roles",
            List.of(roles)));
    return claims;
  }

  private static Map<String, Object> common(Instant now, String subject) {
    Map<String, Object> claims =
        new LinkedHashMap<>(Map.of("iss", ISSUER, "aud", AUDIENCE, "sub", subject));
    claims.put("iat", now.getEpochSecond());
    claims.put("exp", now.getEpochSecond() + 900);
    claims.put("sid", UUID.randomUUID().toString());
    claims.put("jti", UUID.randomUUID().toString());
    return claims;
  }

  public String mint(Map<String, Object> claims) {
    String header = "{\"typ\":\"at+jwt\",\"alg\":\"ES256\",\"kid\":\"" + key.getKeyID() + "\"}";
    return mint(header, JSONObjectUtils.toJSONString(claims));
  }

  /** These very texts, with a valid signature. */
  String mint(String header, String claims) {
    return mint(header.getBytes(UTF_8), claims.getBytes(UTF_8));
  }

  String mint(byte[] header, byte[] claims) {
    try {
      String signed = Base64URL.encode(header) + "." + Base64URL.encode(claims);
      var algorithm = JWSHeader.parse(Map.of("alg", "ES256"));
      return signed + "." + new ECDSASigner(key).sign(algorithm, signed.getBytes(UTF_8));
    } catch (JOSEException | java.text.ParseException impossible) {
      throw new AssertionError(impossible);
    }
  }
}
