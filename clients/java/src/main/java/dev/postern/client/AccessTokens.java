package dev.postern.client;

import static java.nio.charset.StandardCharsets.UTF_8;

import com.nimbusds.jose.JOSEException;
import com.nimbusds.jose.util.JSONObjectUtils;
import dev.postern.client.Caller.SubjectType;
import java.security.GeneralSecurityException;
import java.text.ParseException;
import java.time.Instant;
import java.util.Arrays;
import java.util.Base64;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.Set;
import java.util.function.Function;

/**
 * Reads access tokens (RFC 9068) as the server reads them: nothing is accepted that Postern does
 * not write. Times are not checked here, and neither is whether the token was revoked.
 */
final class AccessTokens {
  /** No token that Postern mints is longer. A longer one is refused before it is decoded. */
  static final int MAX_BYTES = 8 * 1024;

  /** The last second that a token may name: the end of the year 9998. */
  private static final long LATEST_TIME = 253_370_764_799L;

  /**
   * {@code crit}, {@code jwk}, {@code jku} and all others are refused: they could only mislead a
   * reader.
   */
  private static final Set<String> HEADER_MEMBERS = Set.of("typ", "alg", "kid");

  /**
   * A token whose signature and claims are good, and the key that it was verified with. Times are
   * NumericDates.
   */
  record Verified(Caller caller, long issueTime, long expireTime, String kid, Keys.Key key) {}

  /** What makes a token invalid. It says nothing, because a caller is told nothing. */
  private static final class Malformed extends Exception {
    private static final long serialVersionUID = 1;
  }

  private AccessTokens() {}

  /** The token, if it was signed by one of the keys for this issuer and audience; else empty. */
  static Optional<Verified> verify(
      String token, String issuer, String audience, Function<String, Keys.Key> keys) {
    try {
      String[] segments = token.split("\\.", -1);
      if (segments.length != 3) {
        return Optional.empty();
      }
      Map<String, Object> header = object(segments[0]);
      String kid = string(header, "kid");
      String algorithm = string(header, "alg");
      if (!string(header, "typ").equals("at+jwt") || !header.keySet().equals(HEADER_MEMBERS)) {
        return Optional.empty();
      }
      byte[] signature = decode(segments[2]);
      Keys.Key key = keys.apply(kid);
      byte[] signed = token.substring(0, token.lastIndexOf('.')).getBytes(UTF_8);
      if (key == null
          || !key.algorithm().getName().equals(algorithm)
          || !key.check().verify(signed, signature)) {
        return Optional.empty();
      }
      Map<String, Object> claims = object(segments[1]);
      if (!string(claims, "iss").equals(issuer) || !string(claims, "aud").equals(audience)) {
        return Optional.empty();
      }
      long expireTime = time(claims, "exp");
      Caller caller = caller(claims, Instant.ofEpochSecond(expireTime));
      return Optional.of(new Verified(caller, time(claims, "iat"), expireTime, kid, key));
    } catch (Malformed
        | ParseException
        | JOSEException
        | GeneralSecurityException
        | IllegalArgumentException malformed) {
      return Optional.empty();
    }
  }

  private static Caller caller(Map<String, Object> claims, Instant expireTime) throws Malformed {
    boolean isPerson =
        !claims.containsKey("subject_type") || string(claims, "subject_type").equals("user");
    boolean hasAddress = claims.get("email") != null && claims.get("email_verified") != null;
    boolean hasNone = claims.get("email") == null && claims.get("email_verified") == null;
    String subject = id(claims, "sub");
    String client = string(claims, "client_id");
    boolean fits =
        isPerson
            ? hasAddress
            : string(claims, "subject_type").equals("service") && client.equals(subject) && hasNone;
    if (!fits || claims.containsKey("gen") && !(claims.get("gen") instanceof Long)) {
      throw new Malformed();
    }
    return new Caller(
        subject,
        isPerson ? SubjectType.USER : SubjectType.SERVICE,
        client,
        id(claims, "sid"),
        id(claims, "jti"),
        string(claims, "username"),
        isPerson ? Optional.of(string(claims, "email")) : Optional.empty(),
        isPerson && claim(claims, "email_verified", Boolean.class),
        strings(claims, "roles"),
        expireTime);
  }

  private static List<String> strings(Map<String, Object> object, String name) throws Malformed {
    List<?> list = claim(object, name, List.class);
    if (!list.stream().allMatch(String.class::isInstance)) {
      throw new Malformed();
    }
    return list.stream().map(String.class::cast).toList();
  }

  /**
   * A NumericDate in whole seconds, far enough from the ends of time that a leeway can be added.
   */
  private static long time(Map<String, Object> object, String name) throws Malformed {
    return Math.max(0, Math.min(LATEST_TIME, claim(object, name, Long.class)));
  }

  private static String string(Map<String, Object> object, String name) throws Malformed {
    return claim(object, name, String.class);
  }

  private static String id(Map<String, Object> object, String name) throws Malformed {
    String id = string(object, name);
    if (id.isEmpty()) {
      throw new Malformed();
    }
    return id;
  }

  private static <T> T claim(Map<String, Object> object, String name, Class<T> type)
      throws Malformed {
    if (!type.isInstance(object.get(name))) {
      throw new Malformed();
    }
    return type.cast(object.get(name));
  }

  /** A segment that is a JSON object in UTF-8, no member of which comes twice. */
  private static Map<String, Object> object(String segment) throws Malformed, ParseException {
    byte[] bytes = decode(segment);
    String text = new String(bytes, UTF_8);
    Map<String, Object> object = JSONObjectUtils.parse(text);
    if (object == null || !Arrays.equals(text.getBytes(UTF_8), bytes)) {
      throw new Malformed();
    }
    return object;
  }

  /** The bytes of a strict base64url segment: no padding, and no bits that mean nothing. */
  private static byte[] decode(String segment) throws Malformed {
    byte[] bytes = Base64.getUrlDecoder().decode(segment);
    if (!Base64.getUrlEncoder().withoutPadding().encodeToString(bytes).equals(segment)) {
      throw new Malformed();
    }
    return bytes;
  }
}
