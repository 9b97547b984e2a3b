// The connection to Postern's gRPC address, from Node.

import type { SecureClientSessionOptions } from "node:http2";
import type { Interceptor, Transport } from "@connectrpc/connect";
import { createGrpcTransport, Http2SessionManager } from "@connectrpc/connect-node";

/** A connection to Postern that notices when it is dead. */
export interface PosternTransport extends Transport {
  /** Drops the connection, with the calls on it. The next call opens another one. */
  reset(): void;
}

/**
 * A transport for calls by gRPC. It connects with the first call.
 *
 * @param baseUrl `https://…`, or `http://…` for plaintext, with the host and the port of `POSTERN_GRPC_ADDR`
 * @param options `interceptors` for all calls; `tls`, such as `{ ca }`, if the certificate is of an authority of your own
 */
export function posternTransport(
  baseUrl: string,
  options: { readonly interceptors?: Interceptor[]; readonly tls?: SecureClientSessionOptions } = {},
): PosternTransport {
  const pings = { pingIntervalMs: 10_000, pingTimeoutMs: 5_000 };
  const sessionManager = new Http2SessionManager(baseUrl, pings, options.tls);
  const transport = createGrpcTransport({ baseUrl, sessionManager, interceptors: options.interceptors ?? [] });
  return { unary: transport.unary, stream: transport.stream, reset: () => sessionManager.abort() };
}
