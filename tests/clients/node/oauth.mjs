// Gets, introspects and revokes tokens as another team's Node service would, with only the URL of the issuer.
//
//   node oauth.mjs DIRECTORY ISSUER < credentials
//
// `oauth4webapi` is loaded from DIRECTORY/node_modules. Reads {"client_id", "client_secret", "refresh_token"}: those of a
// service, and the token of a person. Prints what came back of each step as JSON. An error of OAuth is printed as its code.
import { readFileSync } from "node:fs";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [directory, issuer] = process.argv.slice(2);
const oauth = await import(pathToFileURL(resolve(directory, "node_modules/oauth4webapi/build/index.js")));
const given = JSON.parse(readFileSync(0, "utf8"));

const plain = { [oauth.allowInsecureRequests]: true };
const url = new URL(issuer);
const found = await oauth.discoveryRequest(url, { algorithm: "oauth2", ...plain });
const server = await oauth.processDiscoveryResponse(url, found);

const service = { client_id: given.client_id };
const byBasic = oauth.ClientSecretBasic(given.client_secret);
const person = { client_id: "postern" };

async function own(authentication, parameters = {}) {
  const answer = await oauth.clientCredentialsGrantRequest(server, service, authentication, parameters, plain);
  return oauth.processClientCredentialsResponse(server, service, answer);
}

async function renew(token) {
  const answer = await oauth.refreshTokenGrantRequest(server, person, oauth.None(), token, plain);
  return oauth.processRefreshTokenResponse(server, person, answer);
}

async function introspect(token, authentication = byBasic) {
  const answer = await oauth.introspectionRequest(server, service, authentication, token, plain);
  return oauth.processIntrospectionResponse(server, service, answer);
}

async function revoke(token) {
  const answer = await oauth.revocationRequest(server, person, oauth.None(), token, plain);
  return (await oauth.processRevocationResponse(answer)) ?? null;
}

// The code of an error that the library has read. It stops at the challenge of a 401, whose body has the code too.
async function failure(attempt) {
  try {
    await attempt;
    return "no error";
  } catch (error) {
    if (error instanceof oauth.ResponseBodyError) return error.error;
    if (error instanceof oauth.WWWAuthenticateChallengeError) return (await error.response.json()).error;
    throw error;
  }
}

const token = await own(byBasic);
const renewed = await renew(given.refresh_token);
console.log(
  JSON.stringify({
    token_type: token.token_type,
    expires_in: token.expires_in,
    service: await introspect(token.access_token),
    person: await introspect(renewed.access_token),
    next_refresh: renewed.refresh_token,
    revoked: await revoke(renewed.refresh_token),
    after: await introspect(renewed.access_token),
    revoked_service: await revoke(token.access_token),
    after_service: await introspect(token.access_token),
    wrong_token: await failure(introspect(token.access_token, oauth.None())),
    wrong_secret: await failure(own(oauth.ClientSecretPost("wrong"))),
    wrong_scope: await failure(own(byBasic, { scope: "read" })),
    wrong_refresh: await failure(renew(renewed.refresh_token)),
  }),
);
