// What a method wants of its caller, and the decision. The transports only bring the values of `authorization`.
import { PosternError, Reason } from "./errors.js";
import type { Caller, Verifier } from "./verifier.js";

/**
 * What a method wants of its caller. `"public"`: nothing, and a token is ignored. `"authenticated"`: a valid token.
 * `"user"` and `"service"`: a token of that kind. More can be wanted with `role` and `emailVerified`.
 */
export type Demand =
  | { readonly access: "public" }
  | {
      readonly access: "authenticated" | "user" | "service";
      /** The caller must have this role. */
      readonly role?: string;
      /** The caller must be a person whose address was verified when the token was issued. */
      readonly emailVerified?: boolean;
    };

/** What each method wants, by its name. A method that is missing is refused for everybody. */
export type Demands = Readonly<Record<string, Demand>>;

const ACCESS: readonly string[] = ["public", "authenticated", "user", "service"] satisfies Demand["access"][];
const callers = new WeakMap<object, Caller>();

/**
 * Decides about a call. Returns its caller, or `undefined` if the method is public. Throws a `PosternError` with the
 * first reason that applies: that of the token, then of the kind of caller, then of the role, then of the address.
 *
 * @param authorization the values of `authorization`, as they came
 * @param demand what the method wants; `undefined` is refused
 */
export async function authorize(
  verifier: Verifier,
  authorization: readonly string[],
  demand: Demand | undefined,
): Promise<Caller | undefined> {
  if (!demand || !ACCESS.includes(demand.access)) {
    throw PosternError.refusal(Reason.ROLE_REQUIRED, "nobody may call this: it declares no demand");
  }
  if (demand.access === "public") return undefined;
  const caller = await verifier.verify(bearerToken(authorization));
  if (demand.access === "user" && caller.subjectType !== "user") throw PosternError.refusal(Reason.USER_REQUIRED);
  if (demand.access === "service" && caller.subjectType !== "service")
    throw PosternError.refusal(Reason.SERVICE_REQUIRED);
  if (demand.role !== undefined && !caller.roles.includes(demand.role))
    throw PosternError.refusal(Reason.ROLE_REQUIRED);
  if (demand.emailVerified && !caller.emailVerified) throw PosternError.refusal(Reason.EMAIL_NOT_VERIFIED);
  return caller;
}

/** Notes the caller of a call. */
export function setCaller(call: object, caller: Caller | undefined): void {
  if (caller) callers.set(call, caller);
}

/**
 * The caller of a call that a guard of this library let through. `call` is what the handler got: a request of node:http,
 * Express or Fastify, a call of grpc-js, or a `HandlerContext` of Connect. Throws in a method that is public, or without
 * a guard, because it has no caller.
 */
export function callerOf(call: object): Caller {
  const { raw, metadata, values } = call as { raw?: unknown; metadata?: unknown; values?: unknown };
  for (const each of [call, raw, metadata, values]) {
    const caller = typeof each === "object" && each !== null ? callers.get(each) : undefined;
    if (caller) return caller;
  }
  throw new Error("this call has no caller: its method is public, or has no guard");
}

/** The token of `authorization: Bearer <token>` (RFC 6750, section 2.1). Another scheme counts as no token. */
function bearerToken(authorization: readonly string[]): string {
  const [value, ...others] = authorization;
  if (others.length > 0) throw PosternError.refusal(Reason.TOKEN_INVALID);
  const found = /^bearer(?: +(.*))?$/is.exec(value ?? "");
  if (!found) throw PosternError.refusal(Reason.TOKEN_MISSING);
  return found[1] ?? "";
}
