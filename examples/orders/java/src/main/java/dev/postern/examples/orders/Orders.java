package dev.postern.examples.orders;

import static java.nio.charset.StandardCharsets.UTF_8;

import com.nimbusds.jose.util.JSONObjectUtils;
import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpServer;
import dev.postern.client.Caller;
import dev.postern.client.Caller.SubjectType;
import dev.postern.client.CallerContext;
import dev.postern.client.Demand;
import dev.postern.client.Demands;
import dev.postern.client.PosternFilter;
import dev.postern.client.RevocationFeed;
import dev.postern.client.RevocationState;
import dev.postern.client.TokenSource;
import dev.postern.client.Verifier;
import dev.postern.client.Verifier.WhenUnknown;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import java.io.IOException;
import java.net.InetSocketAddress;
import java.nio.file.Files;
import java.nio.file.Path;
import java.text.ParseException;
import java.time.Duration;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.concurrent.ConcurrentSkipListMap;
import java.util.concurrent.Executors;
import java.util.concurrent.atomic.AtomicLong;

/**
 * A service with orders in memory. People have orders of their own; services see all; admins
 * delete.
 */
public final class Orders {
  /** Who may call what. Everything else is refused. */
  private static final Map<String, Demand> DEMANDS =
      Map.of(
          "GET /orders", Demand.AUTHENTICATED,
          "POST /orders", Demand.USER,
          "DELETE /orders/*", Demand.AUTHENTICATED.withRole("admin"),
          "GET /healthz", Demand.PUBLIC);

  private final Map<Long, Map<String, Object>> orders = new ConcurrentSkipListMap<>();
  private final AtomicLong lastId = new AtomicLong();

  public static void main(String[] arguments) throws Exception {
    ManagedChannel channel =
        Grpc.newChannelBuilder(setting("POSTERN_GRPC_ADDR"), InsecureChannelCredentials.create())
            .build();
    TokenSource tokens = TokenSource.service(channel, setting("POSTERN_CLIENT_ID"), secret());
    String staleness = System.getenv().getOrDefault("ORDERS_MAX_STALENESS_SECONDS", "30");
    RevocationState revocations =
        new RevocationState(Duration.ofSeconds(Long.parseLong(staleness)));
    RevocationFeed feed = RevocationFeed.start(channel, tokens, revocations);
    WhenUnknown choice =
        WhenUnknown.valueOf(setting("ORDERS_WHEN_REVOCATIONS_UNKNOWN").toUpperCase(Locale.ROOT));
    Verifier verifier =
        Verifier.builder(setting("POSTERN_ISSUER"), setting("POSTERN_AUDIENCE"))
            .revocations(revocations, choice)
            .build();

    String[] address = setting("ORDERS_ADDR").split(":(?=\\d+$)");
    HttpServer server =
        HttpServer.create(new InetSocketAddress(address[0], Integer.parseInt(address[1])), 0);
    server.setExecutor(Executors.newFixedThreadPool(16));
    server
        .createContext("/", new Orders()::handle)
        .getFilters()
        .add(new PosternFilter(new Demands(verifier, DEMANDS)));
    // Without this, calls that come early are refused or accepted as chosen above.
    while (!revocations.awaitComplete(Duration.ofSeconds(10))) {
      feed.lastFailure()
          .ifPresent(failure -> System.err.println("no revocations yet: " + failure.getMessage()));
    }
    server.start();
    System.out.println("orders is ready");
  }

  private void handle(HttpExchange exchange) throws IOException {
    try {
      String path = exchange.getRequestURI().getPath();
      switch (exchange.getRequestMethod() + " " + path.replaceFirst("^/orders/.+", "/orders/*")) {
        case "GET /healthz" -> answer(exchange, 200, "ok");
        case "GET /orders" ->
            answer(exchange, 200, json("orders", visible(CallerContext.current())));
        case "POST /orders" -> create(exchange, CallerContext.current());
        case "DELETE /orders/*" -> answer(exchange, delete(path.substring(8)) ? 204 : 404, "");
        default -> answer(exchange, 404, "");
      }
    } catch (ParseException malformed) {
      answer(exchange, 400, "the body must be like {\"item\": \"a lamp\"}");
    } finally {
      exchange.close();
    }
  }

  private List<Map<String, Object>> visible(Caller caller) {
    boolean seesAll = caller.subjectType() == SubjectType.SERVICE;
    return orders.values().stream()
        .filter(order -> seesAll || order.get("owner").equals(caller.subject()))
        .toList();
  }

  private void create(HttpExchange exchange, Caller caller) throws IOException, ParseException {
    byte[] body = exchange.getRequestBody().readNBytes(65536);
    String item = JSONObjectUtils.getString(JSONObjectUtils.parse(new String(body, UTF_8)), "item");
    if (item == null) {
      throw new ParseException("no item", 0);
    }
    long id = lastId.incrementAndGet();
    orders.put(id, Map.of("id", id, "owner", caller.subject(), "item", item));
    answer(exchange, 201, JSONObjectUtils.toJSONString(orders.get(id)));
  }

  private boolean delete(String id) {
    return id.matches("\\d{1,18}") && orders.remove(Long.valueOf(id)) != null;
  }

  private static void answer(HttpExchange exchange, int status, String text) throws IOException {
    byte[] body = text.getBytes(UTF_8);
    String type = text.startsWith("{") ? "application/json" : "text/plain";
    exchange.getResponseHeaders().set("Content-Type", type);
    exchange.sendResponseHeaders(status, body.length == 0 ? -1 : body.length);
    exchange.getResponseBody().write(body);
  }

  private static String json(String name, Object value) {
    return JSONObjectUtils.toJSONString(Map.of(name, value));
  }

  private static String secret() throws IOException {
    String file = System.getenv("POSTERN_CLIENT_SECRET_FILE");
    return file == null
        ? setting("POSTERN_CLIENT_SECRET")
        : Files.readString(Path.of(file)).strip();
  }

  private static String setting(String name) {
    String value = System.getenv(name);
    if (value == null) {
      throw new IllegalArgumentException(name + " is not set");
    }
    return value;
  }
}
