package dev.postern.client;

import dev.postern.client.Caller.SubjectType;
import io.grpc.Status.Code;

/**
 * Which callers a method wants.
 *
 * @param kind which kind of caller
 * @param role a role that the caller must have, such as {@code admin}; null if none
 * @param needsVerifiedEmail whether the caller must be a person whose address was verified when the
 *     token was issued
 */
public record Demand(Kind kind, String role, boolean needsVerifiedEmail) {
  /** The kinds of callers that can be demanded. */
  public enum Kind {
    /** Everybody. A token is ignored, whether valid or not, and there is no {@link Caller}. */
    PUBLIC,
    /** A person or a service. */
    AUTHENTICATED,
    /** A person. */
    USER,
    /** A service. */
    SERVICE
  }

  /** For everybody, without a token. */
  public static final Demand PUBLIC = new Demand(Kind.PUBLIC, null, false);

  /** For people and services. */
  public static final Demand AUTHENTICATED = new Demand(Kind.AUTHENTICATED, null, false);

  /** For people. */
  public static final Demand USER = new Demand(Kind.USER, null, false);

  /** For services. */
  public static final Demand SERVICE = new Demand(Kind.SERVICE, null, false);

  /** What is open to everybody can ask for nothing. */
  public Demand {
    if (kind == Kind.PUBLIC && (role != null || needsVerifiedEmail)) {
      throw new IllegalArgumentException(
          "a public method knows no caller, and so no role and no address");
    }
  }

  /** The same, only for callers with this role. */
  public Demand withRole(String required) {
    return new Demand(kind, required, needsVerifiedEmail);
  }

  /** The same, only for people whose address is verified. */
  public Demand withVerifiedEmail() {
    return new Demand(kind, role, true);
  }

  /** Throws PERMISSION_DENIED, with the reason, unless this caller is wanted. */
  public void check(Caller caller) {
    if (kind == Kind.USER && caller.subjectType() != SubjectType.USER) {
      throw denied(
          Reason.USER_REQUIRED, "this call is for people, and the token is that of a service");
    }
    if (kind == Kind.SERVICE && caller.subjectType() != SubjectType.SERVICE) {
      throw denied(
          Reason.SERVICE_REQUIRED, "this call is for services, and the token is that of a person");
    }
    if (role != null && !caller.hasRole(role)) {
      throw denied(Reason.ROLE_REQUIRED, "the caller lacks the role that this call needs");
    }
    if (needsVerifiedEmail && !caller.emailVerified()) {
      throw denied(Reason.EMAIL_NOT_VERIFIED, "the email address is not verified");
    }
  }

  static PosternException denied(String reason, String message) {
    return PosternException.refusal(Code.PERMISSION_DENIED, reason, message);
  }
}
