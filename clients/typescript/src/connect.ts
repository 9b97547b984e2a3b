// Interceptors of Connect: the token for outgoing calls, and the guard of a server. Both work for streams too.
import type { Interceptor } from "@connectrpc/connect";
import { authorize, type Demands, setCaller } from "./demands.js";
import { PosternError } from "./errors.js";
import type { TokenSource } from "./tokens.js";
import type { Verifier } from "./verifier.js";

/** Attaches the access token to each call of a client: `createGrpcTransport({ interceptors: [withToken(tokens)], … })`. */
export function withToken(tokens: TokenSource): Interceptor {
  return (next) => async (request) => {
    try {
      request.header.set("authorization", `Bearer ${await tokens.token({ signal: request.signal })}`);
    } catch (error) {
      throw PosternError.from(error).toConnectError();
    }
    return next(request);
  };
}

/**
 * Guards the methods of a server: `connectNodeAdapter({ interceptors: [guard(verifier, demands)], … })`. In a handler,
 * `callerOf(context)` is the caller.
 *
 * @param demands by full method name, such as `/orders.v1.OrderService/ListOrders`
 */
export function guard(verifier: Verifier, demands: Demands): Interceptor {
  return (next) => async (request) => {
    const demand = demands[`/${request.service.typeName}/${request.method.name}`];
    const value = request.header.get("authorization");
    try {
      setCaller(request.contextValues, await authorize(verifier, value === null ? [] : [value], demand));
    } catch (error) {
      // Anything else is a bug: Connect answers INTERNAL, without its message.
      throw error instanceof PosternError ? error.toConnectError() : error;
    }
    return next(request);
  };
}
