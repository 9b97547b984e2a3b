package dev.postern.client;

/**
 * The reasons of errors, as in the proto enum {@code ErrorReason}. A server of a later version
 * sends others too: compare with these, and decide by {@link PosternException#code} when none fits.
 */
public final class Reason {
  /**
   * A field is malformed, missing or refused by policy: see {@link
   * PosternException#fieldViolations}.
   */
  public static final String INVALID_FIELD = "INVALID_FIELD";

  /** Another account has this address. */
  public static final String EMAIL_TAKEN = "EMAIL_TAKEN";

  /** Another account has this username. */
  public static final String USERNAME_TAKEN = "USERNAME_TAKEN";

  /** Wrong password, unknown address or disabled account. */
  public static final String INVALID_CREDENTIALS = "INVALID_CREDENTIALS";

  /** The call has no access token. */
  public static final String TOKEN_MISSING = "TOKEN_MISSING";

  /** The access token is malformed or forged, or of another issuer or audience. */
  public static final String TOKEN_INVALID = "TOKEN_INVALID";

  /** The access token has expired: renew it. */
  public static final String TOKEN_EXPIRED = "TOKEN_EXPIRED";

  /** The session of the access token has ended: log in again. */
  public static final String SESSION_REVOKED = "SESSION_REVOKED";

  /** The refresh token is expired, revoked, reused or unknown: log in again. */
  public static final String REFRESH_TOKEN_INVALID = "REFRESH_TOKEN_INVALID";

  /** The call, or the deployment, requires a verified address. */
  public static final String EMAIL_NOT_VERIFIED = "EMAIL_NOT_VERIFIED";

  /** The token from a mail is wrong, used, superseded or expired. */
  public static final String ONE_TIME_TOKEN_INVALID = "ONE_TIME_TOKEN_INVALID";

  /** The caller lacks a role; or nobody may call the method. */
  public static final String ROLE_REQUIRED = "ROLE_REQUIRED";

  /** No enabled admin would be left. */
  public static final String LAST_ADMIN = "LAST_ADMIN";

  /** There is no such thing that the caller may see. */
  public static final String NOT_FOUND = "NOT_FOUND";

  /** A limit was reached: wait for {@link PosternException#retryDelay}. */
  public static final String THROTTLED = "THROTTLED";

  /** The server has too much to do: wait for {@link PosternException#retryDelay}. */
  public static final String OVERLOADED = "OVERLOADED";

  /** The database is not available. Of this library: keys or revocations are unknown. */
  public static final String STORE_UNAVAILABLE = "STORE_UNAVAILABLE";

  /** The call is for people, and the token is that of a service. */
  public static final String USER_REQUIRED = "USER_REQUIRED";

  /** The call is for services, and the token is that of a person. */
  public static final String SERVICE_REQUIRED = "SERVICE_REQUIRED";

  /** The credentials of a service are unknown, wrong, expired, deleted or disabled. */
  public static final String INVALID_CLIENT = "INVALID_CLIENT";

  /** The cursor of a stream of revocations is too old, or from another database. */
  public static final String CURSOR_EXPIRED = "CURSOR_EXPIRED";

  private Reason() {}
}
