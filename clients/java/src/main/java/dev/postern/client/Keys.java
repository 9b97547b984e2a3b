package dev.postern.client;

import com.nimbusds.jose.JOSEException;
import com.nimbusds.jose.JWSAlgorithm;
import com.nimbusds.jose.JWSHeader;
import com.nimbusds.jose.JWSVerifier;
import com.nimbusds.jose.crypto.ECDSAVerifier;
import com.nimbusds.jose.crypto.RSASSAVerifier;
import com.nimbusds.jose.jwk.Curve;
import com.nimbusds.jose.jwk.ECKey;
import com.nimbusds.jose.jwk.JWK;
import com.nimbusds.jose.jwk.JWKSet;
import com.nimbusds.jose.jwk.KeyUse;
import com.nimbusds.jose.jwk.OctetKeyPair;
import com.nimbusds.jose.jwk.RSAKey;
import com.nimbusds.jose.util.Base64URL;
import com.nimbusds.jose.util.JSONObjectUtils;
import io.grpc.Status.Code;
import java.lang.System.Logger.Level;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.security.GeneralSecurityException;
import java.security.KeyFactory;
import java.security.Signature;
import java.security.spec.X509EncodedKeySpec;
import java.text.ParseException;
import java.time.Duration;
import java.util.Arrays;
import java.util.HashMap;
import java.util.HexFormat;
import java.util.Map;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CompletionException;
import java.util.concurrent.TimeUnit;
import java.util.function.LongSupplier;
import java.util.function.Supplier;

/**
 * The public keys that sign access tokens, by {@code kid}. They are fetched when the first token is
 * checked, every five minutes from then on (in the background of a check), and when a token names
 * an unknown key: one fetch at a time for all who wait, and at most one within the cooldown. A
 * failed fetch keeps the known keys. It blocks for 5 s at most.
 */
public final class Keys {
  /** How long after a fetch an unknown key does not cause another one. */
  public static final Duration DEFAULT_COOLDOWN = Duration.ofSeconds(10);

  private static final System.Logger LOG = System.getLogger(Keys.class.getName());

  /** What stands before the 32 bytes of a key in its X.509 form (RFC 8410, section 4). */
  private static final byte[] ED25519_PREFIX = HexFormat.of().parseHex("302a300506032b6570032100");

  private static final Duration FETCH_TIMEOUT = Duration.ofSeconds(5);
  private static final long REFRESH_AFTER = Duration.ofMinutes(5).toNanos();

  /**
   * A key, and the only algorithm that it is for: a token does not choose it. The same one stays as
   * long as it is published unchanged.
   */
  record Key(JWK jwk, JWSAlgorithm algorithm, SignatureCheck check) {}

  /** Whether a signature fits. */
  interface SignatureCheck {
    boolean verify(byte[] signed, byte[] signature) throws JOSEException, GeneralSecurityException;
  }

  private final Supplier<CompletableFuture<JWKSet>> fetcher;
  private final long cooldown;
  private final LongSupplier nanoTime;

  private volatile Map<String, Key> known; // Null before the first fetch that succeeds.
  private volatile long succeededAt;
  private long beganAt; // This and the next: guarded by this.
  private CompletableFuture<Void> inFlight;

  Keys(Supplier<CompletableFuture<JWKSet>> fetcher, Duration cooldown, LongSupplier nanoTime) {
    this.fetcher = fetcher;
    this.cooldown = cooldown.toNanos();
    this.nanoTime = nanoTime;
    this.beganAt = nanoTime.getAsLong() - this.cooldown;
  }

  /** The keys at {@code <issuer>/.well-known/jwks.json}. */
  public static Keys ofIssuer(String issuer) {
    return at(URI.create(withoutSlash(issuer) + "/.well-known/jwks.json"));
  }

  /** The keys at this URL. */
  public static Keys at(URI jwks) {
    return new Keys(() -> get(jwks).thenApply(Keys::parse), DEFAULT_COOLDOWN, System::nanoTime);
  }

  /**
   * The keys at the {@code jwks_uri} that {@code <issuer>/.well-known/openid-configuration} names.
   */
  public static Keys discover(String issuer) {
    URI configuration = URI.create(withoutSlash(issuer) + "/.well-known/openid-configuration");
    return new Keys(
        () ->
            get(configuration)
                .thenCompose(text -> get(jwksUri(text, issuer)))
                .thenApply(Keys::parse),
        DEFAULT_COOLDOWN,
        System::nanoTime);
  }

  /** These keys, which are never fetched. */
  public static Keys fixed(JWKSet keys) {
    return new Keys(
        () -> CompletableFuture.completedFuture(keys), Duration.ofDays(365), System::nanoTime);
  }

  /**
   * The key of this name, or null if none is published. UNAVAILABLE if there have never been any
   * keys.
   */
  Key find(String kid) {
    Map<String, Key> keys = known;
    Key key = keys == null ? null : keys.get(kid);
    if (key != null) {
      if (nanoTime.getAsLong() - succeededAt >= REFRESH_AFTER) {
        fetch(null);
      }
      return key;
    }
    CompletableFuture<Void> fetch = fetch(kid);
    if (fetch != null) {
      fetch.join(); // It never fails, and ends within the timeout.
    }
    if (known == null) {
      throw PosternException.refusal(
          Code.UNAVAILABLE, Reason.STORE_UNAVAILABLE, "the public keys cannot be fetched");
    }
    return known.get(kid);
  }

  /** Whether this very key is still published. */
  boolean has(String kid, Key key) {
    return find(kid) == key;
  }

  /**
   * The fetch to wait for: the one that is under way, or a new one; null if that would be too
   * early, or not needed.
   */
  private synchronized CompletableFuture<Void> fetch(String missing) {
    if (missing != null && known != null && known.containsKey(missing)) {
      return null;
    }
    if (inFlight != null || nanoTime.getAsLong() - beganAt < cooldown) {
      return inFlight;
    }
    beganAt = nanoTime.getAsLong();
    CompletableFuture<Void> fetch = new CompletableFuture<>();
    inFlight = fetch;
    CompletableFuture.completedFuture(null)
        .thenCompose(nothing -> fetcher.get())
        .thenApply(this::index)
        .orTimeout(FETCH_TIMEOUT.toMillis(), TimeUnit.MILLISECONDS)
        .whenComplete((keys, failure) -> finish(fetch, keys, failure));
    return fetch;
  }

  private void finish(CompletableFuture<Void> fetch, Map<String, Key> keys, Throwable failure) {
    synchronized (this) {
      if (keys != null) {
        known = keys;
        succeededAt = nanoTime.getAsLong();
      }
      inFlight = null;
    }
    fetch.complete(null);
    if (failure != null) {
      LOG.log(Level.WARNING, "the public keys cannot be fetched: " + failure);
    }
  }

  private Map<String, Key> index(JWKSet keys) {
    Map<String, Key> index = new HashMap<>();
    for (JWK jwk : keys.getKeys()) {
      JWSAlgorithm algorithm = algorithm(jwk);
      boolean fits =
          algorithm != null
              && jwk.getKeyID() != null
              && (jwk.getAlgorithm() == null || algorithm.equals(jwk.getAlgorithm()))
              && (jwk.getKeyUse() == null || KeyUse.SIGNATURE.equals(jwk.getKeyUse()));
      if (fits) {
        JWK key = jwk.toPublicJWK();
        Key old = known == null ? null : known.get(key.getKeyID());
        index.put(
            key.getKeyID(),
            old != null && old.jwk.equals(key) ? old : new Key(key, algorithm, check(key)));
      }
    }
    return Map.copyOf(index);
  }

  /** The algorithm of a kind of key that Postern has, or null. */
  private static JWSAlgorithm algorithm(JWK jwk) {
    if (jwk instanceof ECKey ec && Curve.P_256.equals(ec.getCurve())) {
      return JWSAlgorithm.ES256;
    }
    if (jwk instanceof OctetKeyPair pair && Curve.Ed25519.equals(pair.getCurve())) {
      return JWSAlgorithm.EdDSA;
    }
    return jwk instanceof RSAKey ? JWSAlgorithm.RS256 : null;
  }

  private static SignatureCheck check(JWK jwk) {
    try {
      if (jwk instanceof OctetKeyPair pair) {
        return ed25519(pair);
      }
      JWSVerifier verifier =
          jwk instanceof ECKey ec ? new ECDSAVerifier(ec) : new RSASSAVerifier(jwk.toRSAKey());
      JWSHeader header = new JWSHeader(algorithm(jwk));
      return (signed, signature) -> verifier.verify(header, signed, Base64URL.encode(signature));
    } catch (JOSEException | GeneralSecurityException impossible) {
      throw new IllegalArgumentException(impossible); // The kind of the key was compared.
    }
  }

  /** With the JDK: Nimbus would need another library for it. */
  private static SignatureCheck ed25519(OctetKeyPair pair) throws GeneralSecurityException {
    byte[] x = pair.getDecodedX();
    byte[] encoded = Arrays.copyOf(ED25519_PREFIX, ED25519_PREFIX.length + x.length);
    System.arraycopy(x, 0, encoded, ED25519_PREFIX.length, x.length);
    var key = KeyFactory.getInstance("Ed25519").generatePublic(new X509EncodedKeySpec(encoded));
    return (signed, signature) -> {
      Signature check = Signature.getInstance("Ed25519");
      check.initVerify(key);
      check.update(signed);
      return check.verify(signature);
    };
  }

  private static JWKSet parse(String text) {
    try {
      return JWKSet.parse(text);
    } catch (ParseException malformed) {
      throw new CompletionException(malformed);
    }
  }

  private static URI jwksUri(String text, String issuer) {
    try {
      Map<String, Object> configuration = JSONObjectUtils.parse(text);
      if (!issuer.equals(JSONObjectUtils.getString(configuration, "issuer"))) {
        throw new IllegalArgumentException("this is the configuration of another issuer");
      }
      return JSONObjectUtils.getURI(configuration, "jwks_uri");
    } catch (ParseException malformed) {
      throw new CompletionException(malformed);
    }
  }

  private static CompletableFuture<String> get(URI uri) {
    HttpRequest request = HttpRequest.newBuilder(uri).timeout(FETCH_TIMEOUT).build();
    return Http.CLIENT
        .sendAsync(request, HttpResponse.BodyHandlers.ofString())
        .thenApply(
            response -> {
              if (response.statusCode() != 200) {
                throw new IllegalStateException(uri + " answers " + response.statusCode());
              }
              return response.body();
            });
  }

  private static String withoutSlash(String issuer) {
    return issuer.endsWith("/") ? issuer.substring(0, issuer.length() - 1) : issuer;
  }

  /** One client for all, and none for those who never fetch. */
  private static final class Http {
    static final HttpClient CLIENT = HttpClient.newBuilder().connectTimeout(FETCH_TIMEOUT).build();
  }
}
