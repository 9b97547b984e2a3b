// The guard of Fastify. It needs no type of Fastify, so that every version that has these members will do.
import type { IncomingMessage } from "node:http";
import type { Demands } from "./demands.js";
import { refuse } from "./http.js";
import type { Verifier } from "./verifier.js";

interface Request {
  readonly raw: IncomingMessage;
  readonly method: string;
  readonly is404: boolean;
  readonly routeOptions: { readonly url?: string | undefined };
}

interface Reply {
  code(status: number): unknown;
  headers(headers: Record<string, string>): unknown;
  send(body: unknown): unknown;
}

/**
 * Guards every route of an application: `app.addHook("onRequest", guard(verifier, demands))`. In a handler,
 * `callerOf(request)` is the caller.
 *
 * @param demands by method and path as the route declares them, such as `DELETE /orders/:id`. `GET` includes `HEAD`.
 */
export function guard(verifier: Verifier, demands: Demands) {
  return async (request: Request, reply: Reply): Promise<unknown> => {
    if (request.is404) return undefined;
    const method = request.method === "HEAD" ? "GET" : request.method;
    const demand = demands[`${method} ${request.routeOptions.url}`];
    const refusal = await refuse(verifier, demand, request.raw);
    if (!refusal) return undefined;
    reply.code(refusal.status);
    reply.headers(refusal.headers);
    return reply.send(refusal.body);
  };
}
