// The guard of HTTP servers: node:http, and every framework whose middleware has its form, such as Express.
import type { IncomingMessage, ServerResponse } from "node:http";
import { Code } from "@connectrpc/connect";
import { authorize, type Demand, setCaller } from "./demands.js";
import { ERROR_DOMAIN, PosternError, Reason } from "./errors.js";
import type { Caller, Verifier } from "./verifier.js";

/** The answer to a refused request: RFC 6750 in the header, AIP-193 in the body. */
export interface Refusal {
  readonly status: number;
  readonly headers: Readonly<Record<string, string>>;
  readonly body: object;
}

/**
 * Guards a route of Express: `app.get("/orders", guard(verifier, { access: "user" }), handler)`. In the handler,
 * `callerOf(request)` is the caller. A route without a guard is open to everybody.
 */
export function guard(verifier: Verifier, demand: Demand) {
  return async (request: IncomingMessage, response: ServerResponse, next: (error?: unknown) => void): Promise<void> => {
    try {
      if (!(await admit(verifier, demand, request, response))) return;
    } catch (error) {
      next(error);
      return;
    }
    next();
  };
}

/** Decides about a request of node:http. Returns whether to go on; if not, the request is answered already. */
export async function admit(
  verifier: Verifier,
  demand: Demand | undefined,
  request: IncomingMessage,
  response: ServerResponse,
): Promise<boolean> {
  const refusal = await refuse(verifier, demand, request);
  if (!refusal) return true;
  response.writeHead(refusal.status, refusal.headers).end(JSON.stringify(refusal.body));
  return false;
}

/** Decides about a request, and notes its caller. Returns the answer if it is refused. Rejects only because of a bug. */
export async function refuse(
  verifier: Verifier,
  demand: Demand | undefined,
  request: IncomingMessage,
): Promise<Refusal | undefined> {
  let caller: Caller | undefined;
  try {
    caller = await authorize(verifier, authorizationOf(request), demand);
  } catch (error) {
    if (error instanceof PosternError) return refusalOf(error);
    throw error;
  }
  setCaller(request, caller);
  return undefined;
}

/** Every value of `authorization`. `request.headers` has only the first. */
function authorizationOf({ rawHeaders }: IncomingMessage): string[] {
  return rawHeaders.filter((_, index) => index % 2 === 1 && rawHeaders[index - 1]?.toLowerCase() === "authorization");
}

function refusalOf(error: PosternError): Refusal {
  const [status, name] = STATUSES.get(error.code) ?? [503, "UNAVAILABLE"];
  const info = {
    "@type": "type.googleapis.com/google.rpc.ErrorInfo",
    reason: error.reason,
    domain: ERROR_DOMAIN,
    metadata: {},
  };
  const headers: Record<string, string> = { "content-type": "application/json" };
  if (status === 401)
    headers["www-authenticate"] = error.reason === Reason.TOKEN_MISSING ? "Bearer" : 'Bearer error="invalid_token"';
  if (status === 403) headers["www-authenticate"] = 'Bearer error="insufficient_scope"';
  if (status === 503) headers["retry-after"] = "1";
  return {
    status,
    headers,
    body: { error: { code: status, status: name, message: error.message, details: error.reason ? [info] : [] } },
  };
}

const STATUSES = new Map<Code, readonly [number, string]>([
  [Code.Unauthenticated, [401, "UNAUTHENTICATED"]],
  [Code.PermissionDenied, [403, "PERMISSION_DENIED"]],
]);
