package dev.postern.client;

import static java.nio.charset.StandardCharsets.ISO_8859_1;
import static java.nio.charset.StandardCharsets.UTF_8;

import dev.postern.client.AccessTokens.Verified;
import io.grpc.Status.Code;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.time.Clock;
import java.util.LinkedHashMap;
import java.util.Map;

/**
 * Verifies access tokens offline, as the server does: signature, issuer, audience, expiry and
 * claims. With revocations it also refuses tokens that have ended early. For all threads; create
 * one and keep it.
 */
public final class Verifier {
  /**
   * How far the clock of the server may be ahead, for {@code iat}, or behind, for {@code exp}. In
   * seconds.
   */
  static final long LEEWAY = 5;

  /** How many verified tokens are remembered. Each takes about 1 KB. */
  private static final int REMEMBERED = 10_000;

  /**
   * What to do while it is unknown what was revoked: the feed is down, or its first heartbeat has
   * not come yet.
   */
  public enum WhenUnknown {
    /**
     * Refuse every token, with UNAVAILABLE. A logout always counts; calls fail while Postern cannot
     * be reached.
     */
    REFUSE,
    /**
     * Accept tokens that verify and are not known as revoked. Calls go on; a logout may count only
     * when the token expires.
     */
    ACCEPT
  }

  private final String issuer;
  private final String audience;
  private final Keys keys;
  private final Clock clock;
  private final RevocationState revocations;
  private final WhenUnknown whenUnknown;
  private final Map<String, Verified> verified =
      new LinkedHashMap<>(16, 0.75f, true) {
        private static final long serialVersionUID = 1;

        @Override
        protected boolean removeEldestEntry(Map.Entry<String, Verified> eldest) {
          return size() > REMEMBERED;
        }
      };

  private Verifier(Builder builder) {
    this.issuer = builder.issuer;
    this.audience = builder.audience;
    this.keys = builder.keys == null ? Keys.ofIssuer(builder.issuer) : builder.keys;
    this.clock = builder.clock;
    this.revocations = builder.revocations;
    this.whenUnknown = builder.whenUnknown;
  }

  /**
   * A verifier of tokens of this issuer for this audience.
   *
   * @param issuer {@code POSTERN_ISSUER} of the server, byte for byte
   * @param audience {@code POSTERN_AUDIENCE} of the server, {@code postern} by default
   */
  public static Builder builder(String issuer, String audience) {
    return new Builder(issuer, audience);
  }

  /** How tokens are verified. What is not set has the default that its method names. */
  public static final class Builder {
    private final String issuer;
    private final String audience;
    private Keys keys;
    private Clock clock = Clock.systemUTC();
    private RevocationState revocations;
    private WhenUnknown whenUnknown;

    private Builder(String issuer, String audience) {
      this.issuer = issuer;
      this.audience = audience;
    }

    /** Where the public keys come from. Default: {@link Keys#ofIssuer}. */
    public Builder keys(Keys from) {
      this.keys = from;
      return this;
    }

    /** Refuses what was revoked, too. Default: a token is accepted until it expires. */
    public Builder revocations(RevocationState state, WhenUnknown choice) {
      this.revocations = java.util.Objects.requireNonNull(state);
      this.whenUnknown = java.util.Objects.requireNonNull(choice);
      return this;
    }

    /** What tells the time. Default: the clock of the machine. */
    public Builder clock(Clock source) {
      this.clock = source;
      return this;
    }

    /** The verifier. It fetches nothing before its first token. */
    public Verifier build() {
      return new Verifier(this);
    }
  }

  /**
   * The caller of this access token. It blocks while keys are fetched, for 5 s at most.
   *
   * @throws PosternException UNAUTHENTICATED: {@link Reason#TOKEN_INVALID}, {@link
   *     Reason#TOKEN_EXPIRED} or {@link Reason#SESSION_REVOKED}. UNAVAILABLE: there have never been
   *     any keys, or revocations are unknown
   */
  public Caller verify(String token) {
    Verified claims = read(token);
    long now = clock.instant().getEpochSecond();
    if (now >= claims.expireTime() + LEEWAY) {
      throw unauthenticated(Reason.TOKEN_EXPIRED, "the access token has expired");
    }
    // A clock was wrong, and this token would outlive what revokes it.
    if (claims.issueTime() > now + LEEWAY) {
      throw invalid();
    }
    return revocations == null ? claims.caller() : revocations.check(claims.caller(), whenUnknown);
  }

  private Verified read(String token) {
    byte[] bytes = token.getBytes(UTF_8);
    if (bytes.length > AccessTokens.MAX_BYTES) {
      throw invalid();
    }
    String digest = sha256(bytes);
    Verified known;
    synchronized (verified) {
      known = verified.get(digest);
    }
    if (known != null && keys.has(known.kid(), known.key())) {
      return known;
    }
    Verified fresh =
        AccessTokens.verify(token, issuer, audience, keys::find).orElseThrow(Verifier::invalid);
    synchronized (verified) {
      verified.put(digest, fresh);
    }
    return fresh;
  }

  private static String sha256(byte[] bytes) {
    try {
      return new String(MessageDigest.getInstance("SHA-256").digest(bytes), ISO_8859_1);
    } catch (NoSuchAlgorithmException impossible) {
      throw new IllegalStateException(impossible); // Every JRE has it.
    }
  }

  static PosternException invalid() {
    return unauthenticated(Reason.TOKEN_INVALID, "the access token is invalid");
  }

  static PosternException unauthenticated(String reason, String message) {
    return PosternException.refusal(Code.UNAUTHENTICATED, reason, message);
  }
}
