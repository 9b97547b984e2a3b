package dev.postern.client;

import java.util.Optional;
import java.util.concurrent.atomic.AtomicReference;

/**
 * Where the refresh token of a session is kept. Each refresh token works once: only the one that
 * was saved last is good. A store belongs to one {@link TokenSource} at a time, which calls it from
 * one thread at a time.
 */
public interface RefreshTokenStore {
  /** The token that was saved last; empty if there is none. */
  Optional<String> load();

  /**
   * Keeps this token in the place of the one before. The access token that came with it is handed
   * out when this returns. If it throws, the renewal fails, and the next one asks for the same
   * token again.
   */
  void save(String refreshToken);

  /** A store that ends with the program. */
  static RefreshTokenStore inMemory() {
    AtomicReference<String> kept = new AtomicReference<>();
    return new RefreshTokenStore() {
      @Override
      public Optional<String> load() {
        return Optional.ofNullable(kept.get());
      }

      @Override
      public void save(String refreshToken) {
        kept.set(refreshToken);
      }
    };
  }
}
