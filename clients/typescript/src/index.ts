// Access tokens of Postern, for services on Node: get them, verify them, and notice when they are revoked.
export { guard, withToken } from "./connect.js";
export { authorize, callerOf, type Demand, type Demands } from "./demands.js";
export { ERROR_DOMAIN, type FieldViolation, PosternError, Reason } from "./errors.js";
export { type FeedOptions, type FeedStatus, RevocationFeed } from "./feed.js";
export {
  loginTokens,
  type RefreshTokenStore,
  type SessionOptions,
  serviceTokens,
  sessionTokens,
  type TokenOptions,
} from "./grants.js";
export { type KeyOptions, KeySet, type PublicKey } from "./keys.js";
export type { Clock } from "./repeat.js";
export { RevocationState } from "./revocations.js";
export { type Grant, TokenSource } from "./tokens.js";
export { type PosternTransport, posternTransport } from "./transport.js";
export { type Caller, type Revocations, Verifier, type VerifierOptions } from "./verifier.js";
