// Verifies an access token as another team's Node service would, with only the URL of the keys.
//
//   node verify.mjs DIRECTORY JWKS_URL ISSUER AUDIENCE < token
//
// `jose` is loaded from DIRECTORY/node_modules. Prints {"header", "claims"}, or {"error"} with jose's code and exit status 1.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { webcrypto } from "node:crypto";

// Node 18 has Web Crypto, but not as the global variable that jose uses.
globalThis.crypto ??= webcrypto;

const [directory, jwksUrl, issuer, audience] = process.argv.slice(2);
const found = createRequire(resolve(directory, "package.json")).resolve("jose");
const { createRemoteJWKSet, jwtVerify } = await import(pathToFileURL(found));

const token = readFileSync(0, "utf8").trim();
try {
  const { payload, protectedHeader } = await jwtVerify(token, createRemoteJWKSet(new URL(jwksUrl)), {
    issuer,
    audience,
    typ: "at+jwt",
  });
  console.log(JSON.stringify({ header: protectedHeader, claims: payload }));
} catch (error) {
  console.log(JSON.stringify({ error: error.code ?? String(error) }));
  process.exitCode = 1;
}
