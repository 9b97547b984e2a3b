// Interceptors of grpc-js: the token for outgoing calls, and the guard of a server. Both work for streams too.
import {
  InterceptingCall,
  type Interceptor,
  Metadata,
  ServerInterceptingCall,
  type ServerInterceptor,
  type StatusObject,
  status,
} from "@grpc/grpc-js";
import { authorize, type Demands, setCaller } from "./demands.js";
import { PosternError } from "./errors.js";
import type { TokenSource } from "./tokens.js";
import type { Verifier } from "./verifier.js";

/** A call whose deadline is as near as this is not begun: grpc-js would not report that it has ended. */
const TOO_LATE_MS = 5;

/**
 * Attaches the access token to each call of a client: `new Client(address, credentials, { interceptors: [withToken(tokens)] })`.
 * Unlike call credentials it works on plaintext channels too.
 */
export function withToken(tokens: TokenSource): Interceptor {
  return (options, nextCall) => {
    const ended = new AbortController();
    return new InterceptingCall(nextCall(options), {
      start(metadata, listener, next) {
        const left = Number(options.deadline ?? Number.POSITIVE_INFINITY) - Date.now() - TOO_LATE_MS;
        const timer = Number.isFinite(left) ? setTimeout(() => ended.abort(LATE), Math.max(left, 0)) : undefined;
        tokens
          .token({ signal: ended.signal })
          .then(
            (token) => {
              metadata.set("authorization", `Bearer ${token}`);
              next(metadata, listener);
            },
            (error: unknown) => listener.onReceiveStatus(statusOf(PosternError.from(error))),
          )
          .finally(() => clearTimeout(timer));
      },
      cancel(next) {
        ended.abort(CANCELLED);
        next();
      },
    });
  };
}

const LATE = new PosternError(status.DEADLINE_EXCEEDED as number, "", "the deadline passed before there was a token");
const CANCELLED = new PosternError(status.CANCELLED as number, "", "cancelled before there was a token");

/**
 * Guards the methods of a server: `new Server({ interceptors: [guard(verifier, demands)] })`. In a handler, `callerOf(call)`
 * is the caller.
 *
 * @param demands by full method name, such as `/orders.v1.OrderService/ListOrders`
 */
export function guard(verifier: Verifier, demands: Demands): ServerInterceptor {
  return (method, call) =>
    new ServerInterceptingCall(call, {
      start(next) {
        next({
          onReceiveMetadata(metadata, proceed) {
            authorize(verifier, metadata.get("authorization").map(String), demands[method.path]).then(
              (caller) => {
                setCaller(metadata, caller);
                proceed(metadata);
              },
              (error: unknown) => call.sendStatus(refusalOf(error)),
            );
          },
        });
      },
    });
}

function refusalOf(error: unknown): StatusObject {
  if (error instanceof PosternError) return statusOf(error);
  process.emitWarning(error instanceof Error ? error : String(error));
  return { code: status.INTERNAL, details: "internal error", metadata: new Metadata() };
}

function statusOf(error: PosternError): StatusObject {
  const metadata = new Metadata();
  metadata.set("grpc-status-details-bin", Buffer.from(error.toStatusDetails()));
  return { code: error.code as number, details: error.message, metadata };
}
