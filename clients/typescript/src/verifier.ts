// Checks access tokens offline, by the same rules as Postern (its src/domain/token.rs). What a token says is remembered;
// its times, its key and its revocation are looked at every time.
import { compactVerify, errors } from "jose";
import { PosternError, Reason } from "./errors.js";
import { type KeyOptions, KeySet } from "./keys.js";
import { RecentMap } from "./recent.js";
import type { Clock } from "./repeat.js";

const MAX_TOKEN_BYTES = 8 * 1024;
const LEEWAY_SECONDS = 5;
/** The last second that a token may name: the end of the year 9998. */
const LATEST_SECONDS = 253_370_764_799;
const REMEMBERED_TOKENS = 10_000;

/** Who a token stands for. */
export interface Caller {
  /** `sub`: the id of the user or of the service account. It is never reused. */
  readonly subject: string;
  readonly subjectType: "user" | "service";
  /** The client that the token was issued to. Of a service: its own id. */
  readonly clientId: string;
  /** `sid`: the id of the session, or of the key of the service account. */
  readonly sessionId: string;
  /** `jti`: the id of the token. */
  readonly tokenId: string;
  /** The name of the account when the token was issued. */
  readonly username: string;
  /** The address of a person when the token was issued. A service has none. */
  readonly email?: string;
  /** Whether that address was verified then. */
  readonly emailVerified?: boolean;
  /** The roles: those that the account has now, if revocations are followed. */
  readonly roles: readonly string[];
  readonly expireTime: Date;
}

/** Knows which tokens were revoked: a `RevocationFeed`, or a `RevocationState`. */
export interface Revocations {
  /** The caller with its current roles. Throws a `PosternError`: `SESSION_REVOKED`, or `UNAVAILABLE`. */
  check(caller: Caller): Caller;
}

/** Options of `Verifier`. */
export interface VerifierOptions extends KeyOptions {
  /** `aud` of the tokens: `POSTERN_AUDIENCE`. */
  readonly audience: string;
  /** What tells which tokens were revoked. `"none"`: a token is accepted until it expires, also after a logout. */
  readonly revocations: Revocations | "none";
}

/** A token whose signature was verified. */
interface Verified {
  readonly kid: string;
  readonly issuedAt: number;
  readonly expiresAt: number;
  readonly caller: Caller;
}

/** Verifies access tokens. One per process: it keeps the keys, and the last 10,000 tokens that it verified. */
export class Verifier {
  readonly #keys: KeySet;
  readonly #clock: Clock;
  readonly #remembered = new RecentMap<string, Verified>(REMEMBERED_TOKENS);

  constructor(private readonly options: VerifierOptions) {
    this.#keys = new KeySet(options);
    this.#clock = options.clock ?? Date.now;
  }

  /**
   * Says who the caller is. Throws a `PosternError`: `TOKEN_INVALID`, `TOKEN_EXPIRED`, `SESSION_REVOKED`, or
   * `STORE_UNAVAILABLE` with the code `UNAVAILABLE` when there are no keys or revocations to judge by.
   */
  async verify(token: string): Promise<Caller> {
    const verified = await this.#recall(token);
    const now = Math.floor(this.#clock() / 1_000);
    if (now >= verified.expiresAt + LEEWAY_SECONDS) throw PosternError.refusal(Reason.TOKEN_EXPIRED);
    if (verified.issuedAt > now + LEEWAY_SECONDS) throw invalid();
    const { revocations } = this.options;
    return revocations === "none" ? verified.caller : revocations.check(verified.caller);
  }

  async #recall(token: string): Promise<Verified> {
    const known = this.#remembered.get(token);
    if (known && this.#keys.knows(known.kid)) return known;
    const verified = await this.#read(token);
    this.#remembered.set(token, verified);
    return verified;
  }

  /** Reads a token and verifies its signature. Its times are not checked here. */
  async #read(token: string): Promise<Verified> {
    const segments = token.split(".");
    if (token.length > MAX_TOKEN_BYTES || segments.length !== 3 || !segments.every(isStrict)) throw invalid();
    const kid = keyIdOf(segments[0] as string);
    const key = kid === undefined ? undefined : await this.#keys.get(kid);
    if (kid === undefined || key === undefined) throw invalid();
    const { algorithm } = key;
    const { payload } = await compactVerify(token, key.key, { algorithms: [algorithm] }).catch((error: unknown) => {
      throw error instanceof errors.JOSEError ? invalid() : error;
    });
    const claims = objectIn(payload);
    if (claims?.["iss"] !== this.options.issuer || claims["aud"] !== this.options.audience) throw invalid();
    const { iat, exp } = claims;
    if (!isInteger(iat) || !isInteger(exp)) throw invalid();
    const caller = callerOf(claims, exp);
    if (!caller) throw invalid();
    return { kid, issuedAt: iat, expiresAt: exp, caller };
  }
}

function invalid(): PosternError {
  return PosternError.refusal(Reason.TOKEN_INVALID);
}

/** Whether this is base64url without padding, and the only spelling of its bytes. */
function isStrict(segment: string): boolean {
  return Buffer.from(segment, "base64url").toString("base64url") === segment;
}

/** The `kid` of a header that has exactly the members of Postern's tokens. */
function keyIdOf(segment: string): string | undefined {
  const bytes = Buffer.from(segment, "base64url");
  const header = objectIn(bytes);
  // Three members are six strings. More of them are another member, or one that comes twice: JSON.parse takes its last.
  const strings = bytes.toString().match(/"(?:[^"\\]|\\.)*"/g)?.length;
  if (!header || strings !== 6) return undefined;
  const { typ, alg, kid } = header;
  return typ === "at+jwt" && typeof alg === "string" && typeof kid === "string" ? kid : undefined;
}

function objectIn(bytes: Uint8Array): Record<string, unknown> | undefined {
  try {
    const value: unknown = JSON.parse(new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes));
    return typeof value === "object" && value !== null && !Array.isArray(value)
      ? (value as Record<string, unknown>)
      : undefined;
  } catch {
    return undefined;
  }
}

/** The caller of these claims. `undefined` if they are not the claims of a person or of a service. */
function callerOf(claims: Record<string, unknown>, exp: number): Caller | undefined {
  const { sub, client_id, sid, jti, username, roles, email, email_verified, subject_type = "user" } = claims;
  if (![sub, client_id, sid, jti].every(isName) || typeof username !== "string" || !isListOfStrings(roles))
    return undefined;
  const common = {
    subject: sub as string,
    clientId: client_id as string,
    sessionId: sid as string,
    tokenId: jti as string,
    username,
    roles: Object.freeze(roles),
    expireTime: new Date(Math.min(Math.max(exp, 0), LATEST_SECONDS) * 1_000),
  };
  if (subject_type === "user" && typeof email === "string" && typeof email_verified === "boolean") {
    return Object.freeze({ ...common, subjectType: subject_type, email, emailVerified: email_verified });
  }
  const isService =
    subject_type === "service" && client_id === sub && (email ?? email_verified ?? undefined) === undefined;
  return isService ? Object.freeze({ ...common, subjectType: subject_type }) : undefined;
}

function isName(value: unknown): value is string {
  return typeof value === "string" && value !== "";
}

function isInteger(value: unknown): value is number {
  return Number.isSafeInteger(value);
}

function isListOfStrings(value: unknown): value is string[] {
  return Array.isArray(value) && value.every((each) => typeof each === "string");
}
