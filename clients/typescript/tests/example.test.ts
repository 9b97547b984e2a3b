// The example, as it is started by its `run`: it is a service of its own that knows the library only as its users do.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { createServer } from "node:http";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { test } from "node:test";
import { posternTransport, serviceTokens } from "@postern/client";
import { type Account, env, listen, type Service, stage, until } from "./support.js";

const RUN = join(import.meta.dirname, "../../../../examples/orders/typescript/run");

async function freePort(): Promise<number> {
  const server = createServer();
  const port = await listen(server);
  await new Promise((resolve) => server.close(resolve));
  return port;
}

/** Starts the example with these settings, does something with it, and ends it by SIGTERM. */
async function withOrders(settings: Record<string, string>, use: (call: Call) => Promise<void>): Promise<void> {
  const address = `127.0.0.1:${await freePort()}`;
  const variables = { ...process.env, ORDERS_ADDR: address, ...settings };
  const child = spawn(RUN, { env: variables, stdio: ["ignore", "pipe", "inherit"] });
  const exited = once(child, "exit") as Promise<[number]>;
  try {
    const [line] = (await Promise.race([once(createInterface(child.stdout), "line"), exited])) as unknown[];
    assert.equal(line, "orders is ready");
    await use(async (method, path, token, body) => {
      const headers = {
        ...(token && { authorization: `Bearer ${token}` }),
        ...(body && { "content-type": "application/json" }),
      };
      const answer = await fetch(`http://${address}${path}`, {
        method,
        headers,
        ...(body && { body: JSON.stringify(body) }),
      });
      const text = await answer.text();
      return { status: answer.status, body: text.startsWith("{") ? JSON.parse(text) : text };
    });
  } finally {
    child.kill("SIGTERM");
    assert.deepEqual(await exited, [0, null]);
  }
}

type Call = (method: string, path: string, token?: string, body?: object) => Promise<{ status: number; body: unknown }>;

test("orders belong to people, services see all, admins delete, and a logout counts at once", async () => {
  await withOrders({ ORDERS_WHEN_REVOCATIONS_UNKNOWN: "refuse" }, async (call) => {
    const [ada, bob] = [await stage<Account>("/accounts"), await stage<Account>("/accounts")];
    const admin = await stage<Account>("/accounts?role=admin");
    const account = await stage<Service>("/services");
    const service = await serviceTokens(posternTransport(`http://${env("POSTERN_GRPC_ADDR")}`), account).token();
    const order = { id: 1, owner: ada.id, item: "tea" };

    assert.deepEqual(await call("GET", "/healthz"), { status: 200, body: "ok" });
    assert.equal((await call("GET", "/orders")).status, 401);
    assert.deepEqual(await call("POST", "/orders", ada.accessToken, { item: "tea" }), { status: 201, body: order });
    assert.equal((await call("POST", "/orders", ada.accessToken, {})).status, 400);
    assert.equal((await call("POST", "/orders", service, { item: "tea" })).status, 403);
    assert.deepEqual((await call("GET", "/orders", ada.accessToken)).body, { orders: [order] });
    assert.deepEqual((await call("GET", "/orders", bob.accessToken)).body, { orders: [] });
    assert.deepEqual((await call("GET", "/orders", service)).body, { orders: [order] });
    assert.equal((await call("DELETE", "/orders/1", ada.accessToken)).status, 403);
    assert.equal((await call("DELETE", "/orders/1", admin.accessToken)).status, 204);
    assert.equal((await call("DELETE", "/orders/1", admin.accessToken)).status, 404);

    await stage("/logout", { refreshToken: ada.refreshToken });
    await until("she is refused", async () => (await call("GET", "/orders", ada.accessToken)).status === 401, 1_000);
  });
});

test("it ends at once when a setting is missing", async () => {
  const child = spawn(RUN, { env: { PATH: process.env["PATH"] }, stdio: "ignore" });
  assert.deepEqual(await once(child, "exit"), [1, null]);
});
