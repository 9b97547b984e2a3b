package dev.postern.client;

import java.time.Instant;
import java.util.List;
import java.util.Optional;

/**
 * Who calls, as a verified access token says, with the roles that the caller has now as far as
 * revocations are followed.
 *
 * @param subject {@code sub}: the id of the user or of the service account; never reused
 * @param subjectType what kind of caller it is
 * @param clientId {@code client_id}: {@code postern} for a person, else the id of the service
 *     account
 * @param sessionId {@code sid}: the id of the session, or of the key of the service account
 * @param tokenId {@code jti}: the id of the token
 * @param username the name of the account when the token was issued
 * @param email the address of the person when the token was issued; empty for a service
 * @param emailVerified whether that address was verified then; false for a service
 * @param roles such as {@code admin}; there may be none
 * @param expireTime when the token expires; whole seconds
 */
public record Caller(
    String subject,
    SubjectType subjectType,
    String clientId,
    String sessionId,
    String tokenId,
    String username,
    Optional<String> email,
    boolean emailVerified,
    List<String> roles,
    Instant expireTime) {

  /** The kinds of callers. */
  public enum SubjectType {
    /** A person, with an account of their own. */
    USER,
    /** A service account. */
    SERVICE
  }

  /** Whether the caller has this role. */
  public boolean hasRole(String role) {
    return roles.contains(role);
  }

  Caller withRoles(List<String> current) {
    return new Caller(
        subject,
        subjectType,
        clientId,
        sessionId,
        tokenId,
        username,
        email,
        emailVerified,
        current,
        expireTime);
  }
}
