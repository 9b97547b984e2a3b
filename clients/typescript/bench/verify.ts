// How many checks of access tokens one core does: of tokens that were verified before, and of new ones.
//
//     node build/bench/verify.js
import { Verifier } from "@postern/client";
import { exportJWK, generateKeyPair, SignJWT } from "jose";

const ISSUER = "http://localhost:8080";
const { publicKey, privateKey } = await generateKeyPair("ES256");
const jwk = { ...(await exportJWK(publicKey)), kid: "bench" };
const now = Math.floor(Date.now() / 1_000);

function mint(id: number): Promise<string> {
  const account = {
    sub: `user-${id}`,
    client_id: "postern",
    sid: `session-${id}`,
    jti: `token-${id}`,
    username: "ada",
  };
  const address = { email: "ada@example.com", email_verified: true };
  return new SignJWT({ ...account, ...address, iss: ISSUER, aud: "orders", iat: now, exp: now + 900, roles: ["user"] })
    .setProtectedHeader({ typ: "at+jwt", alg: "ES256", kid: "bench" })
    .sign(privateKey);
}

async function measure(what: string, checks: number, check: (index: number) => Promise<unknown>): Promise<void> {
  const begun = performance.now();
  for (let index = 0; index < checks; index++) await check(index);
  const seconds = (performance.now() - begun) / 1_000;
  console.log(`${what}: ${Math.round(checks / seconds)} checks/s`);
}

// A token comes from the network, as a text that was not seen before.
const tokens: Buffer[] = [];
for (let id = 0; id < 2_000; id++) tokens.push(Buffer.from(await mint(id)));
const verifier = new Verifier({ issuer: ISSUER, audience: "orders", keys: { keys: [jwk] }, revocations: "none" });
const check = (index: number) => verifier.verify(String(tokens[index % tokens.length]));
await measure("new tokens", tokens.length, check);
await measure("known tokens", 500_000, check);
