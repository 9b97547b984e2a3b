package dev.postern.client;

import static org.junit.jupiter.api.Assertions.assertThrows;

import org.junit.jupiter.api.function.Executable;

/** What a refusal says. */
final class Refused {
  private Refused() {}

  static String reason(Executable call) {
    return assertThrows(PosternException.class, call).reason();
  }

  static String code(Executable call) {
    return assertThrows(PosternException.class, call).code().name();
  }
}
