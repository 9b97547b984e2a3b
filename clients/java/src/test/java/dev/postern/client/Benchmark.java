package dev.postern.client;

import dev.postern.client.Verifier.WhenUnknown;
import java.time.Instant;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;

/**
 * Prints how many checks one thread makes in a second, of tokens that come again and of tokens that
 * are new.
 */
final class Benchmark {
  private static final int TOKENS = 1000;

  private Benchmark() {}

  public static void main(String[] arguments) {
    Minter minter = new Minter("k");
    RevocationState state = new RevocationState();
    state.apply(Messages.heartbeat(Instant.now()));
    Demands demands =
        new Demands(
            minter.verifier().revocations(state, WhenUnknown.REFUSE).build(),
            Map.of("GET /orders", Demand.USER));
    List<List<String>> known = new ArrayList<>();
    for (int i = 0; i < TOKENS; i++) {
      known.add(List.of("Bearer " + minter.mint(Minter.person(Instant.now()))));
    }
    for (int round = 0; round < 3; round++) {
      Demands fresh = new Demands(minter.verifier().build(), Map.of("GET /orders", Demand.USER));
      print("first checks (with a signature check)", 1, fresh, known);
      print("checks of tokens that were seen before", 300, demands, known);
    }
  }

  private static void print(
      String what, int repetitions, Demands demands, List<List<String>> authorizations) {
    long began = System.nanoTime();
    for (int i = 0; i < repetitions; i++) {
      for (List<String> authorization : authorizations) {
        demands.check("GET /orders", authorization).orElseThrow();
      }
    }
    double seconds = (System.nanoTime() - began) / 1e9;
    System.out.printf("%,12.0f/s %s%n", repetitions * authorizations.size() / seconds, what);
  }
}
