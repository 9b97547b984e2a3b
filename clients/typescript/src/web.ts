// Postern from a browser, by gRPC-Web at its HTTP address. Nothing here needs Node.
import type { Interceptor, Transport } from "@connectrpc/connect";
import { createGrpcWebTransport } from "@connectrpc/connect-web";
import { withToken } from "./connect.js";
import type { TokenSource } from "./tokens.js";

export { createClient } from "@connectrpc/connect";
export { withToken } from "./connect.js";
export { type FieldViolation, PosternError, Reason } from "./errors.js";
export {
  loginTokens,
  type RefreshTokenStore,
  type SessionOptions,
  sessionTokens,
  type TokenOptions,
} from "./grants.js";
export { TokenSource } from "./tokens.js";

/**
 * A transport for `createClient(AuthService, …)` and the other services of `@postern/client/stubs`.
 *
 * @param baseUrl Postern's HTTP address. `POSTERN_CORS_ORIGINS` must name the origin of the page.
 * @param tokens attaches the access token to each call. Signing up, logging in and refreshing need a transport without.
 */
export function webTransport(baseUrl: string, tokens?: TokenSource): Transport {
  const interceptors: Interceptor[] = tokens ? [withToken(tokens)] : [];
  return createGrpcWebTransport({ baseUrl, interceptors });
}
