package dev.postern.client;

import java.time.Instant;

/**
 * An access token for outgoing calls. It does not print itself.
 *
 * @param value the JWT, for {@code authorization: Bearer …}
 * @param expireTime when it expires, by the clock of this machine
 */
public record AccessToken(String value, Instant expireTime) {
  @Override
  public String toString() {
    return "AccessToken[expireTime=" + expireTime + "]";
  }
}
