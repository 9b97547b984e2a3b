// Orders: a small HTTP service whose callers have access tokens of Postern. The orders are kept in memory.
//
//     GET /orders           the orders of a person; for a service, all of them
//     POST /orders          a person orders an item
//     DELETE /orders/:id    an admin deletes an order
//     GET /healthz          everybody
import { readFileSync } from "node:fs";
import { callerOf, type Demands, posternTransport, RevocationFeed, serviceTokens, Verifier } from "@postern/client";
import { guard } from "@postern/client/fastify";
import fastify from "fastify";

interface Order {
  readonly id: number;
  readonly owner: string;
  readonly item: string;
}

/** Who may call what. A route that is missing here is refused for everybody. */
const DEMANDS: Demands = {
  "GET /orders": { access: "authenticated" },
  "POST /orders": { access: "user" },
  "DELETE /orders/:id": { access: "authenticated", role: "admin" },
  "GET /healthz": { access: "public" },
};

function setting(name: string, fallback?: string): string {
  const value = process.env[name] ?? fallback;
  if (value === undefined) throw new Error(`${name} is not set`);
  return value;
}

function whenUnknown(): "refuse" | "accept" {
  const value = setting("ORDERS_WHEN_REVOCATIONS_UNKNOWN");
  if (value === "refuse" || value === "accept") return value;
  throw new Error("ORDERS_WHEN_REVOCATIONS_UNKNOWN must be refuse or accept");
}

function clientSecret(): string {
  const file = process.env["POSTERN_CLIENT_SECRET_FILE"];
  return file ? readFileSync(file, "utf8").trim() : setting("POSTERN_CLIENT_SECRET");
}

/** The routes, guarded. */
function routes(verifier: Verifier) {
  const app = fastify();
  const orders = new Map<number, Order>();
  let lastId = 0;

  app.addHook("onRequest", guard(verifier, DEMANDS));
  // A body is JSON, whatever its type says.
  app.removeAllContentTypeParsers();
  app.addContentTypeParser("*", { parseAs: "string" }, app.getDefaultJsonParser("error", "error"));

  app.get("/orders", (request) => {
    const { subject, subjectType } = callerOf(request);
    const all = [...orders.values()];
    return { orders: subjectType === "service" ? all : all.filter(({ owner }) => owner === subject) };
  });

  app.post<{ Body: { item?: unknown } | null }>("/orders", (request, reply) => {
    const item = request.body?.item;
    if (typeof item !== "string" || item === "") return reply.code(400).send({ error: "an order needs an item" });
    const order = { id: ++lastId, owner: callerOf(request).subject, item };
    orders.set(order.id, order);
    return reply.code(201).send(order);
  });

  app.delete<{ Params: { id: string } }>("/orders/:id", (request, reply) => {
    const isDeleted = orders.delete(Number(request.params.id));
    return reply.code(isDeleted ? 204 : 404).send();
  });

  app.get("/healthz", () => "ok");
  return app;
}

const transport = posternTransport(`http://${setting("POSTERN_GRPC_ADDR")}`);
const credentials = { clientId: setting("POSTERN_CLIENT_ID"), clientSecret: clientSecret() };
const feed = new RevocationFeed({
  transport,
  tokens: serviceTokens(transport, credentials),
  whenUnknown: whenUnknown(),
  maxStalenessMs: Number(setting("ORDERS_MAX_STALENESS_SECONDS", "30")) * 1_000,
});
const [issuer, audience] = [setting("POSTERN_ISSUER"), setting("POSTERN_AUDIENCE")];
const app = routes(new Verifier({ issuer, audience, revocations: feed }));

process.once("SIGTERM", async () => {
  await app.close();
  await feed.close();
  process.exit();
});

const address = setting("ORDERS_ADDR");
const split = address.lastIndexOf(":");
await app.listen({ host: address.slice(0, split), port: Number(address.slice(split + 1)) });
const waiting = setInterval(() => console.error("waiting for revocations:", feed.status.failure?.message), 5_000);
await feed.ready();
clearInterval(waiting);
console.log("orders is ready");
