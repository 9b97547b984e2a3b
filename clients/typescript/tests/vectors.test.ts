// The vectors: tokens that the real server made and judged. This library must judge all of them alike.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { create, fromJson, type JsonValue } from "@bufbuild/protobuf";
import { timestampNow } from "@bufbuild/protobuf/wkt";
import { authorize, type Caller, type Demand, PosternError, RevocationState, Verifier } from "@postern/client";
import { WatchRevocationsResponseSchema } from "@postern/client/stubs";
import type { JWK } from "jose";
import { env } from "./support.js";

interface Case {
  name: string;
  token: string;
  demand: { subject_type: "user" | "service" | null; role: string | null };
  revocations: JsonValue[];
  verdict: string;
  caller?: Record<string, unknown>;
}

function demandOf({ subject_type, role }: Case["demand"]): Demand {
  return { access: subject_type ?? "authenticated", ...(role === null ? {} : { role }) };
}

async function judge(verifier: Verifier, { token, demand }: Case): Promise<{ verdict: string; caller?: Caller }> {
  try {
    const caller = await authorize(verifier, [`Bearer ${token}`], demandOf(demand));
    return { verdict: "ACCEPTED", ...(caller && { caller }) };
  } catch (error) {
    assert.ok(error instanceof PosternError, String(error));
    return { verdict: error.reason };
  }
}

interface Vectors {
  issuer: string;
  audience: string;
  jwks: { keys: JWK[] };
  cases: Case[];
  algorithms: {
    algorithm: string;
    issuer: string;
    audience: string;
    jwks: { keys: JWK[] };
    token: string;
    subject: string;
  }[];
}

function vectors(): Vectors {
  return JSON.parse(readFileSync(env("POSTERN_VECTORS"), "utf8")) as Vectors;
}

test("tokens of every algorithm are accepted", async () => {
  const { algorithms } = vectors();
  assert.equal(algorithms.length, 2);
  for (const { algorithm, issuer, audience, jwks, token, subject } of algorithms) {
    const verifier = new Verifier({ issuer, audience, keys: jwks, revocations: "none" });
    assert.equal((await verifier.verify(token)).subject, subject, algorithm);
  }
});

test("every token gets the verdict of the server", async () => {
  const { issuer, audience, jwks, cases } = vectors();
  const shared = new Verifier({ issuer, audience, keys: jwks, revocations: "none" });
  for (const each of cases) {
    const revocations = new RevocationState();
    for (const message of each.revocations) revocations.apply(fromJson(WatchRevocationsResponseSchema, message));
    const event = { case: "heartbeat" as const, value: { completeTime: timestampNow() } };
    revocations.apply(create(WatchRevocationsResponseSchema, { event }));
    const verifier = new Verifier({ issuer, audience, keys: jwks, revocations });
    // The second time, the verifier remembers the token.
    for (const round of ["first", "second"]) {
      const { verdict, caller } = await judge(verifier, each);
      assert.equal(verdict, each.verdict, `${each.name}, the ${round} time`);
      if (each.verdict !== "ACCEPTED") continue;
      const { expireTime, ...found } = caller as Caller;
      assert.deepEqual({ ...found }, each.caller, each.name);
      assert.ok(expireTime.getTime() > Date.now());
    }
    if (each.revocations.length === 0) assert.equal((await judge(shared, each)).verdict, each.verdict, each.name);
  }
  assert.ok(cases.length > 200);
});
