// The verifier and its keys, with keys of our own and a clock that the test sets.
import assert from "node:assert/strict";
import { after, beforeEach, describe, test } from "node:test";
import { type Caller, Verifier, type VerifierOptions } from "@postern/client";
import { RecentMap } from "../src/recent.js";
import {
  type Account,
  AUDIENCE,
  env,
  ISSUER,
  KeyServer,
  newKey,
  pause,
  refusal,
  serviceClaims,
  stage,
  until,
} from "./support.js";

const key = await newKey();
const other = await newKey();
const server = await KeyServer.start(key.jwk);
after(() => server.close());

let now = Date.now();
const clock = () => now;

function newVerifier(options: Partial<VerifierOptions> = {}): Verifier {
  const keys = new URL(`${server.url}/.well-known/jwks.json`);
  return new Verifier({ issuer: ISSUER, audience: AUDIENCE, keys, revocations: "none", clock, ...options });
}

beforeEach(() => {
  now = Date.now();
  server.fetches = 0;
  server.isBroken = false;
  server.keys = [key.jwk];
  server.issuer = ISSUER;
});

describe("keys", () => {
  test("a thousand first checks at once fetch the keys once", async () => {
    const verifier = newVerifier();
    const tokens = await Promise.all(Array.from({ length: 100 }, () => key.sign()));
    const checks = Array.from({ length: 1_000 }, (_, index) => verifier.verify(tokens[index % 100] as string));
    await Promise.all(checks);
    assert.equal(server.fetches, 1);
  });

  test("a flood of unknown keys fetches once per cooldown", async () => {
    const verifier = newVerifier();
    await verifier.verify(await key.sign());
    const strangers = await Promise.all(Array.from({ length: 20 }, () => newKey()));
    const tokens = await Promise.all(strangers.map((stranger) => stranger.sign()));
    const flood = () => Promise.all(tokens.map((token) => refusal(verifier.verify(token))));
    for (const expected of [1, 2, 3]) {
      for (let round = 0; round < 3; round++) {
        assert.deepEqual(new Set(await flood()), new Set(["TOKEN_INVALID"]));
        assert.equal(server.fetches, expected);
      }
      now += 10_000;
    }
  });

  test("an unknown key is fetched when it is published, also when the clock was set back", async () => {
    const verifier = newVerifier();
    await verifier.verify(await key.sign());
    server.keys = [key.jwk, other.jwk];
    assert.equal(await refusal(verifier.verify(await other.sign())), "TOKEN_INVALID", "within the cooldown");
    now -= 3_600_000;
    await verifier.verify(await other.sign({ iat: 1 }));
  });

  test("old keys are fetched again in the background, and one that is gone is not accepted any more", async () => {
    const verifier = newVerifier();
    const token = await key.sign();
    await verifier.verify(token);
    server.keys = [other.jwk];
    now += 299_000;
    await verifier.verify(token);
    assert.equal(server.fetches, 1);
    now += 1_000;
    await verifier.verify(token);
    await until("the keys are fetched", () => server.fetches === 2);
    await until("the key is gone", async () => (await refusal(verifier.verify(token))) === "TOKEN_INVALID");
    await verifier.verify(await other.sign());
  });

  test("a fetch that fails keeps the keys, and counts for the cooldown", async () => {
    const verifier = newVerifier();
    const token = await key.sign();
    await verifier.verify(token);
    server.isBroken = true;
    now += 300_000;
    for (let round = 0; round < 5; round++) {
      await verifier.verify(token);
      await pause(30);
    }
    assert.equal(server.fetches, 2);
    now += 10_000;
    assert.equal(await refusal(verifier.verify(await other.sign())), "TOKEN_INVALID");
    assert.equal(server.fetches, 3);
  });

  test("without any keys nothing is said about the token", async () => {
    const verifier = newVerifier();
    server.isBroken = true;
    const token = await key.sign();
    for (let round = 0; round < 3; round++) assert.equal(await refusal(verifier.verify(token)), "STORE_UNAVAILABLE");
    assert.equal(server.fetches, 1);
    assert.equal(await refusal(verifier.verify("nonsense")), "TOKEN_INVALID");
    server.isBroken = false;
    now += 10_000;
    await verifier.verify(token);
  });

  test("the discovery document says where the keys are, if it is that of the issuer", async () => {
    server.issuer = server.url;
    const token = await key.sign({ iss: server.url });
    await newVerifier({ issuer: server.url, keys: "discover" }).verify(token);
    server.issuer = `${server.url}/`;
    const verifier = newVerifier({ issuer: server.url, keys: "discover" });
    assert.equal(await refusal(verifier.verify(token)), "STORE_UNAVAILABLE");
  });

  test("keys that are not for ES256 are left out", async () => {
    server.keys = [
      { ...key.jwk, use: "enc" },
      { kty: "oct", k: "AAAA", kid: "a" },
      { kty: "EC", crv: "P-256" },
      other.jwk,
    ];
    const verifier = newVerifier();
    await verifier.verify(await other.sign());
    assert.equal(await refusal(verifier.verify(await key.sign())), "TOKEN_INVALID");
  });
});

describe("tokens", () => {
  test("the times of a token that is remembered are looked at every time", async () => {
    const verifier = newVerifier();
    const begun = Math.floor(now / 1_000);
    const token = await key.sign({ iat: begun + 5, exp: begun + 60 });
    now = begun * 1_000;
    const caller = await verifier.verify(token);
    assert.deepEqual(caller.expireTime, new Date((begun + 60) * 1_000));
    now -= 1;
    assert.equal(await refusal(verifier.verify(token)), "TOKEN_INVALID");
    now = (begun + 65) * 1_000 - 1;
    await verifier.verify(token);
    now += 1;
    assert.equal(await refusal(verifier.verify(token)), "TOKEN_EXPIRED");
  });

  test("a service has no address, and its client is itself", async () => {
    const verifier = newVerifier();
    const { email, emailVerified, ...caller } = await verifier.verify(await key.sign(serviceClaims(["invoices"])));
    assert.deepEqual(
      [caller.subjectType, caller.roles, email, emailVerified],
      ["service", ["invoices"], undefined, undefined],
    );
    assert.equal(caller.clientId, caller.subject);
  });

  test("a header has its three members once, and nothing else, however that is written", async () => {
    const kid = `"kid":"${key.jwk.kid}"`;
    const verdict = async (members: string) =>
      refusal(newVerifier().verify(await key.signWith(`{"typ":"at+jwt","alg":"ES256",${members}}`)));
    assert.equal(await verdict(kid), "ACCEPTED");
    assert.equal(await verdict(` "k\\u0069d" : "${key.jwk.kid}" `), "ACCEPTED");
    for (const wrong of [`"kid":1,${kid}`, `${kid},${kid}`, `${kid},"b64":true`, `${kid},"":{}`, `"kid":1`]) {
      assert.equal(await verdict(wrong), "TOKEN_INVALID", wrong);
    }
  });

  test("revocations are looked at every time", async () => {
    let checks = 0;
    const check = (caller: Caller) => {
      checks++;
      return caller;
    };
    const verifier = newVerifier({ revocations: { check } });
    const token = await key.sign();
    for (let round = 0; round < 3; round++) await verifier.verify(token);
    assert.equal(checks, 3);
  });
});

test("what was not used for the longest time is forgotten", () => {
  const map = new RecentMap<string, number>(2);
  map.set("a", 1);
  map.set("b", 2);
  map.get("a");
  map.set("c", 3);
  assert.deepEqual(
    ["a", "b", "c"].map((key) => map.get(key)),
    [1, undefined, 3],
  );
});

test("a key that the server rotates is fetched, and the old token is still accepted", async () => {
  const issuer = env("POSTERN_ISSUER");
  const verifier = new Verifier({ issuer, audience: env("POSTERN_AUDIENCE"), revocations: "none", cooldownMs: 0 });
  const before = await stage<Account>("/accounts");
  await verifier.verify(before.accessToken);
  const { kid } = await stage<{ kid: string }>("/keys/rotate");
  const after = await stage<Account>("/accounts");
  assert.equal(JSON.parse(atob(after.accessToken.split(".")[0] as string)).kid, kid);
  assert.equal((await verifier.verify(after.accessToken)).subject, after.id);
  assert.equal((await verifier.verify(before.accessToken)).subject, before.id);
});
