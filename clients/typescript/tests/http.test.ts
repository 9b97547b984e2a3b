// The guards of node:http, Express and Fastify: one set of requests, and the same answers from each.
import assert from "node:assert/strict";
import { createServer, request as httpRequest, type IncomingMessage } from "node:http";
import { after, test } from "node:test";
import { callerOf, type Demands, Verifier } from "@postern/client";
import * as withFastify from "@postern/client/fastify";
import { admit, guard } from "@postern/client/http";
import express from "express";
import fastify from "fastify";
import { AUDIENCE, ISSUER, listen, newKey, serviceClaims } from "./support.js";

const key = await newKey();
let isBroken = false;
const revocations = {
  check: (caller: never) => {
    if (isBroken) throw new Error("a bug");
    return caller;
  },
};
const verifier = new Verifier({ issuer: ISSUER, audience: AUDIENCE, keys: { keys: [key.jwk] }, revocations });
const unreachable = new Verifier({ issuer: "http://127.0.0.1:9", audience: AUDIENCE, revocations: "none" });
const demands: Demands = {
  "GET /me": { access: "user" },
  "GET /admin/:page": { access: "authenticated", role: "admin" },
  "GET /healthz": { access: "public" },
};

async function withNode(): Promise<string> {
  const server = createServer(async (request, response) => {
    const route = request.url?.startsWith("/admin/") ? "GET /admin/:page" : `GET ${request.url}`;
    const checked = request.url === "/unavailable" ? unreachable : verifier;
    const demand = request.url === "/unavailable" ? ({ access: "user" } as const) : demands[route];
    if (!(await admit(checked, demand, request, response))) return;
    response.end(route === "GET /healthz" ? "ok" : callerOf(request).username);
  });
  after(() => server.close());
  return `http://127.0.0.1:${await listen(server)}`;
}

async function withExpress(): Promise<string> {
  const app = express();
  app.get(
    "/me",
    guard(verifier, { access: "user" }),
    (request, response) => void response.send(callerOf(request).username),
  );
  app.get("/admin/:page", guard(verifier, { access: "authenticated", role: "admin" }), (request, response) => {
    response.send(callerOf(request).username);
  });
  app.get("/healthz", guard(verifier, { access: "public" }), (_, response) => void response.send("ok"));
  app.get("/unavailable", guard(unreachable, { access: "user" }), (_, response) => void response.send("never"));
  const server = createServer(app);
  after(() => server.close());
  return `http://127.0.0.1:${await listen(server)}`;
}

async function withFastifyServer(): Promise<string> {
  const app = fastify();
  const guarded = withFastify.guard(verifier, demands);
  const unjudged = withFastify.guard(unreachable, { "GET /unavailable": { access: "user" } });
  app.addHook("onRequest", (request, reply) => (request.url === "/unavailable" ? unjudged : guarded)(request, reply));
  app.get("/me", (request) => callerOf(request).username);
  app.get("/admin/:page", (request) => callerOf(request).username);
  app.get("/healthz", () => "ok");
  app.get("/undeclared", () => "never");
  app.get("/unavailable", () => "never");
  after(() => app.close());
  return app.listen({ host: "127.0.0.1", port: 0 });
}

interface Answer {
  status: number;
  challenge: string | undefined;
  text: string;
  error?: {
    code: number;
    status: string;
    message: string;
    details: { "@type": string; reason: string; domain: string }[];
  };
}

/** A request whose header fields are sent as they are given. */
async function get(url: string, authorization: string | string[] = [], method = "GET"): Promise<Answer> {
  const answer = await new Promise<IncomingMessage>((resolve, reject) => {
    const headers = { authorization: authorization as string };
    httpRequest(url, { method, headers: authorization.length > 0 ? headers : {} }, resolve)
      .on("error", reject)
      .end();
  });
  let text = "";
  for await (const chunk of answer.setEncoding("utf8")) text += chunk;
  const challenge = answer.headers["www-authenticate"];
  const isJson = method !== "HEAD" && answer.headers["content-type"]?.startsWith("application/json");
  return { status: answer.statusCode ?? 0, challenge, text, ...(isJson && JSON.parse(text)) };
}

const bearer = async (claims = {}) => `Bearer ${await key.sign(claims)}`;

for (const [name, start] of Object.entries({
  "node:http": withNode,
  Express: withExpress,
  Fastify: withFastifyServer,
})) {
  test(`${name} answers who may not come in`, async () => {
    const base = await start();
    assert.deepEqual(await get(`${base}/healthz`, "Bearer wrong").then(({ status, text }) => [status, text]), [
      200,
      "ok",
    ]);
    assert.equal((await get(`${base}/me`, await bearer())).text, "ada");
    assert.equal((await get(`${base}/admin/x`, await bearer({ roles: ["admin"] }))).text, "ada");

    assert.equal((await get(`${base}/me`, await bearer(), "HEAD")).status, 200);
    assert.equal((await get(`${base}/me`, [], "HEAD")).status, 401);

    const missing = await get(`${base}/me`);
    assert.deepEqual([missing.status, missing.challenge], [401, "Bearer"]);
    assert.deepEqual(missing.error, {
      code: 401,
      status: "UNAUTHENTICATED",
      message: "this call needs an access token",
      details: [
        {
          "@type": "type.googleapis.com/google.rpc.ErrorInfo",
          reason: "TOKEN_MISSING",
          domain: "postern.auth.v1",
          metadata: {},
        },
      ],
    });
    const token = await bearer();
    const refused: [string, string | string[], number, string, string][] = [
      ["/me", "Bearer wrong", 401, 'Bearer error="invalid_token"', "TOKEN_INVALID"],
      ["/me", [token, token], 401, 'Bearer error="invalid_token"', "TOKEN_INVALID"],
      ["/me", await bearer({ iat: 1, exp: 2 }), 401, 'Bearer error="invalid_token"', "TOKEN_EXPIRED"],
      ["/me", await bearer(serviceClaims()), 403, 'Bearer error="insufficient_scope"', "USER_REQUIRED"],
      ["/admin/x", token, 403, 'Bearer error="insufficient_scope"', "ROLE_REQUIRED"],
    ];
    for (const [path, authorization, status, challenge, reason] of refused) {
      const answer = await get(`${base}${path}`, authorization);
      assert.deepEqual(
        [answer.status, answer.challenge, answer.error?.details[0]?.reason],
        [status, challenge, reason],
      );
    }
    if (name !== "Express") assert.equal((await get(`${base}/undeclared`, token)).status, 403);
    if (name !== "node:http") assert.equal((await get(`${base}/nowhere`, token)).status, 404);
  });

  test(`${name} says 503 when it cannot judge, and 500 for a bug`, async () => {
    const base = await start();
    const answer = await get(`${base}/unavailable`, await bearer({ iss: "http://127.0.0.1:9" }));
    assert.deepEqual([answer.status, answer.error?.status], [503, "UNAVAILABLE"]);
    // A bug in a program on node:http is a promise that its handler does not handle.
    if (name === "node:http") return;
    isBroken = true;
    try {
      assert.equal((await get(`${base}/me`, await bearer())).status, 500);
    } finally {
      isBroken = false;
    }
  });
}
