// What the tests share: the stage with the real server, keys and tokens of our own, and a server of keys.
import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { createServer, type Server } from "node:http";
import type { AddressInfo } from "node:net";
import { PosternError } from "@postern/client";
import { exportJWK, generateKeyPair, type JWK, type JWTPayload, SignJWT } from "jose";

export const ISSUER = "http://localhost:8080";
export const AUDIENCE = "orders";

/** A variable of the stage. Without the stage the test fails. */
export function env(name: string): string {
  const value = process.env[name];
  assert.ok(value, `${name} is not set: run the tests by tests/libraries/stage`);
  return value;
}

/** Asks the stage for something. */
export async function stage<T = unknown>(path: string, body: object = {}): Promise<T> {
  const answer = await fetch(`${env("POSTERN_STAGE")}${path}`, { method: "POST", body: JSON.stringify(body) });
  assert.equal(answer.status, 200, `${path}: ${await answer.clone().text()}`);
  return (await answer.json()) as T;
}

/** A person whom the stage has signed up and logged in. */
export interface Account {
  readonly id: string;
  readonly username: string;
  readonly email: string;
  readonly password: string;
  readonly accessToken: string;
  readonly refreshToken: string;
}

export interface Service {
  readonly clientId: string;
  readonly clientSecret: string;
}

/** A signing key of the tests. */
export interface TestKey {
  readonly jwk: JWK;
  sign(claims?: JWTPayload): Promise<string>;
  /** Signs with a header that is written as it is given. */
  signWith(header: string): Promise<string>;
}

/** A key whose tokens are like those of Postern, with the given claims instead of the usual ones. */
export async function newKey(clock: () => number = Date.now): Promise<TestKey> {
  const { publicKey, privateKey } = await generateKeyPair("ES256", { extractable: true });
  const kid = randomUUID();
  return {
    jwk: { ...(await exportJWK(publicKey)), kid, alg: "ES256", use: "sig" },
    sign: (claims = {}) =>
      new SignJWT({ ...personClaims(clock), ...claims })
        .setProtectedHeader({ typ: "at+jwt", alg: "ES256", kid })
        .sign(privateKey),
    signWith: async (header) => {
      const encoded = [header, JSON.stringify(personClaims(clock))].map((part) =>
        Buffer.from(part).toString("base64url"),
      );
      const algorithm = { name: "ECDSA", hash: "SHA-256" };
      const signature = await crypto.subtle.sign(algorithm, privateKey, Buffer.from(encoded.join(".")));
      return [...encoded, Buffer.from(signature).toString("base64url")].join(".");
    },
  };
}

export function personClaims(clock: () => number = Date.now): JWTPayload {
  const now = Math.floor(clock() / 1_000);
  return {
    iss: ISSUER,
    aud: AUDIENCE,
    sub: randomUUID(),
    client_id: "postern",
    iat: now,
    exp: now + 900,
    jti: randomUUID(),
    sid: randomUUID(),
    username: "ada",
    email: "ada@example.com",
    email_verified: false,
    roles: ["user"],
  };
}

/** What makes the token of a person one of a service. */
export function serviceClaims(roles: string[] = []): JWTPayload {
  const id = randomUUID();
  return { sub: id, client_id: id, subject_type: "service", email: undefined, email_verified: undefined, roles };
}

/** Publishes keys by HTTP, and counts how often they were fetched. */
export class KeyServer {
  fetches = 0;
  isBroken = false;
  delayMs = 20;
  keys: JWK[];
  readonly #server: Server;

  private constructor(keys: JWK[]) {
    this.keys = keys;
    this.#server = createServer((request, response) => {
      if (request.url === "/.well-known/openid-configuration") {
        response.end(JSON.stringify({ issuer: this.issuer, jwks_uri: `${this.url}/elsewhere.json` }));
        return;
      }
      this.fetches++;
      setTimeout(() => {
        response.statusCode = this.isBroken ? 500 : 200;
        response.end(JSON.stringify({ keys: this.keys }));
      }, this.delayMs);
    });
  }

  issuer = ISSUER;

  static async start(...keys: JWK[]): Promise<KeyServer> {
    const server = new KeyServer(keys);
    await listen(server.#server);
    return server;
  }

  get url(): string {
    return `http://127.0.0.1:${portOf(this.#server)}`;
  }

  close(): void {
    this.#server.close();
    this.#server.closeAllConnections();
  }
}

export async function listen(server: Server, port = 0): Promise<number> {
  await new Promise<void>((resolve, reject) => {
    server.once("error", reject);
    server.listen(port, "127.0.0.1", resolve);
  });
  return portOf(server);
}

function portOf(server: Server): number {
  return (server.address() as AddressInfo).port;
}

/** The reason of the error that a promise rejects with, or its code where there is none. */
export async function refusal(promise: Promise<unknown>): Promise<string> {
  try {
    await promise;
  } catch (error) {
    const failure = PosternError.from(error);
    return failure.reason || `code ${failure.code}`;
  }
  return "ACCEPTED";
}

/** Waits until something holds, and fails when it does not in time. Returns after how many milliseconds it did. */
export async function until(what: string, holds: () => boolean | Promise<boolean>, withinMs = 10_000): Promise<number> {
  const begun = performance.now();
  while (!(await holds())) {
    assert.ok(performance.now() - begun < withinMs, `not within ${withinMs} ms: ${what}`);
    await pause(10);
  }
  return performance.now() - begun;
}

export async function pause(ms: number): Promise<void> {
  await new Promise((resolve) => setTimeout(resolve, ms));
}
