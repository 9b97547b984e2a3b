// The snippets of the README, run against the real server. The README has these lines word for word (package.test.ts).
import assert from "node:assert/strict";
import { createServer } from "node:http";
import { createServer as createHttp2Server } from "node:http2";
import type { AddressInfo } from "node:net";
import { after, before, test } from "node:test";
import { type ConnectRouter, createClient } from "@connectrpc/connect";
import { connectNodeAdapter } from "@connectrpc/connect-node";
import * as grpc from "@grpc/grpc-js";
import {
  callerOf,
  type Demands,
  guard,
  loginTokens,
  PosternError,
  posternTransport,
  Reason,
  type RefreshTokenStore,
  RevocationFeed,
  serviceTokens,
  sessionTokens,
  type TokenSource,
  Verifier,
  withToken,
} from "@postern/client";
import * as fastifyGuard from "@postern/client/fastify";
import * as grpcGuard from "@postern/client/grpc-js";
import * as httpGuard from "@postern/client/http";
import { AuthService } from "@postern/client/stubs";
import express from "express";
import fastify from "fastify";
import { type Account, env, listen, stage } from "./support.js";

let clientId: string;
let clientSecret: string;
let grpcUrl: string;
let issuer: string;
let tokens: TokenSource;
let feed: RevocationFeed;
let verifier: Verifier;

before(async () => {
  clientId = env("POSTERN_CLIENT_ID");
  clientSecret = env("POSTERN_CLIENT_SECRET");
  grpcUrl = `http://${env("POSTERN_GRPC_ADDR")}`;
  issuer = env("POSTERN_ISSUER");
  {
    const postern = posternTransport(grpcUrl);
    tokens = serviceTokens(postern, { clientId, clientSecret });
  }
  {
    const postern = posternTransport(grpcUrl);
    feed = new RevocationFeed({ transport: postern, tokens, whenUnknown: "refuse" });
    await feed.ready();
    verifier = new Verifier({ issuer, audience: "orders", revocations: feed });
  }
});
after(() => feed.close());

test("outgoing calls", async () => {
  const ordersUrl = await ordersServer();
  const orders = posternTransport(ordersUrl, { interceptors: [withToken(tokens)] });
  await assert.rejects(createClient(AuthService, orders).getMe({}), (error) => {
    return PosternError.from(error).reason === Reason.USER_REQUIRED;
  });
  const address = new URL(ordersUrl).host;
  const client = new grpc.Client(address, grpc.credentials.createInsecure(), {
    interceptors: [grpcGuard.withToken(tokens)],
  });
  client.close();
});

test("a person", async () => {
  const postern = posternTransport(grpcUrl);
  const { email, password } = await stage<Account>("/accounts");
  let saved: string | undefined;
  const store: RefreshTokenStore = {
    load: () => saved,
    save: (refreshToken) => {
      saved = refreshToken;
    },
  };
  const login = loginTokens(postern, { email, password }, { store });
  await login.token();
  const session = sessionTokens(postern, {}, { store });
  await session.token();
  await stage("/logout", { refreshToken: saved });
  session.discard(await session.token());
  async function refresh() {
    try {
      await session.token();
    } catch (error) {
      if (PosternError.from(error).reason === Reason.REFRESH_TOKEN_INVALID) return "log in";
      throw error;
    }
    return "go on";
  }
  assert.equal(await refresh(), "log in");
});

test("verifying", async () => {
  const { accessToken, email } = await stage<Account>("/accounts");
  const caller = await verifier.verify(accessToken);
  console.log(caller.subject, caller.subjectType, caller.roles);
  assert.equal(caller.email, email);
  const { isComplete, completeTime, failure } = feed.status;
  assert.deepEqual([isComplete, failure], [true, undefined]);
  assert.ok(completeTime);
});

/** A server of Connect with one guarded method. */
async function ordersServer(): Promise<string> {
  const routes = (router: ConnectRouter) =>
    router.service(AuthService, {
      getMe: (_, context) => ({ user: { id: callerOf(context).subject } }),
    });
  const demands: Demands = {
    "/postern.auth.v1.AuthService/GetMe": { access: "user" },
    "/postern.auth.v1.AuthService/SignUp": { access: "public" },
    "/postern.auth.v1.AuthService/Logout": { access: "authenticated", role: "admin" },
  };
  const server = createHttp2Server(connectNodeAdapter({ routes, interceptors: [guard(verifier, demands)] }));
  const sameForGrpc = new grpc.Server({ interceptors: [grpcGuard.guard(verifier, demands)] });
  sameForGrpc.forceShutdown();
  server.on("session", (session) => after(() => session.destroy()));
  after(() => server.close());
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
}

test("guards of HTTP", async () => {
  const { accessToken, id } = await stage<Account>("/accounts");
  const headers = { authorization: `Bearer ${accessToken}` };

  const app = fastify();
  app.addHook("onRequest", fastifyGuard.guard(verifier, { "GET /orders/:id": { access: "user" } }));
  app.get("/orders/:id", (request) => callerOf(request).subject);
  assert.equal((await app.inject({ url: "/orders/1", headers })).body, id);

  const site = express();
  site.get("/orders/:id", httpGuard.guard(verifier, { access: "user" }), (request, response) => {
    response.send(callerOf(request).subject);
  });

  const plain = createServer(async (request, response) => {
    if (!(await httpGuard.admit(verifier, { access: "user" }, request, response))) return;
    response.end(callerOf(request).subject);
  });
  for (const server of [plain, createServer(site)]) {
    after(() => server.closeAllConnections());
    after(() => server.close());
    const answer = await fetch(`http://127.0.0.1:${await listen(server)}/orders/1`, { headers });
    assert.equal(await answer.text(), id);
  }
});

test("errors", async () => {
  const auth = createClient(AuthService, posternTransport(grpcUrl));
  const shown: string[] = [];
  const show = (text: string) => shown.push(text);
  try {
    await auth.signUp({ username: "-", email: "ada", password: "short" });
  } catch (thrown) {
    const error = PosternError.from(thrown);
    if (error.reason !== Reason.INVALID_FIELD) throw error;
    for (const { field, description } of error.violations) show(`${field}: ${description}`);
  }
  assert.equal(shown.length, 3);
});
