// The public keys of Postern: when they are fetched, and which ones are accepted.
import { importJWK, type JWK } from "jose";
import { PosternError, Reason } from "./errors.js";
import type { Clock } from "./repeat.js";

/** A public key, and the only algorithm that it is for: a token does not choose it. */
export interface PublicKey {
  readonly algorithm: "ES256" | "EdDSA" | "RS256";
  /** The key for `jose`. */
  readonly key: Awaited<ReturnType<typeof importJWK>>;
}

const FETCH_TIMEOUT_MS = 5_000;

/** Options of `KeySet`. */
export interface KeyOptions {
  /** `iss` of the tokens: the URL below which the keys are published. */
  readonly issuer: string;
  /**
   * Where the keys are. Default: `<issuer>/.well-known/jwks.json`. `"discover"`: where
   * `<issuer>/.well-known/openid-configuration` says. A set of keys: these, and nothing is fetched.
   */
  readonly keys?: URL | "discover" | { readonly keys: readonly JWK[] };
  /** The shortest time between two fetches because of unknown keys or after a failure, in milliseconds. Default: 10 s. */
  readonly cooldownMs?: number;
  /** The age at which known keys are fetched again in the background, in milliseconds. Default: 5 minutes. */
  readonly maxAgeMs?: number;
  /** Default: `Date.now`. */
  readonly clock?: Clock;
}

/**
 * The keys by their `kid`. One fetch is in flight at most, and its result is for everybody who waits. A fetch that fails
 * changes nothing. A fetch that succeeds replaces all keys.
 */
export class KeySet {
  #keys: ReadonlyMap<string, PublicKey> | undefined;
  #fetch: Promise<void> | undefined;
  #attemptedAt = Number.NEGATIVE_INFINITY;
  #fetchedAt = Number.NEGATIVE_INFINITY;
  readonly #clock: Clock;
  readonly #cooldownMs: number;
  readonly #maxAgeMs: number;

  constructor(private readonly options: KeyOptions) {
    this.#clock = options.clock ?? Date.now;
    this.#cooldownMs = options.cooldownMs ?? 10_000;
    this.#maxAgeMs = options.maxAgeMs ?? 300_000;
  }

  /** The key, or `undefined` if none with this `kid` is published. Throws `UNAVAILABLE` if no keys are known at all. */
  async get(kid: string): Promise<PublicKey | undefined> {
    if (!this.knows(kid)) await this.#update();
    if (!this.#keys?.size) throw PosternError.refusal(Reason.STORE_UNAVAILABLE, "the public keys are unknown");
    return this.#keys.get(kid);
  }

  /** Whether the key is known now. Starts a fetch in the background when the keys are old. */
  knows(kid: string): boolean {
    if (this.#age(this.#fetchedAt) >= this.#maxAgeMs) void this.#update();
    return this.#keys?.has(kid) ?? false;
  }

  /** Joins the fetch in flight, or starts one if the cooldown allows it. Never rejects. */
  #update(): Promise<void> {
    if (this.#fetch) return this.#fetch;
    if (this.#age(this.#attemptedAt) < this.#cooldownMs) return Promise.resolve();
    const now = this.#clock();
    this.#attemptedAt = now;
    this.#fetch = this.#load()
      .then(
        (keys) => {
          this.#keys = keys;
          this.#fetchedAt = now;
        },
        () => {
          // The known keys stay.
        },
      )
      .finally(() => {
        this.#fetch = undefined;
      });
    return this.#fetch;
  }

  /** Counts in both directions, because a clock may be set back. */
  #age(time: number): number {
    return Math.abs(this.#clock() - time);
  }

  async #load(): Promise<ReadonlyMap<string, PublicKey>> {
    const { issuer, keys = new URL(`${issuer.replace(/\/$/, "")}/.well-known/jwks.json`) } = this.options;
    if (keys instanceof URL) return imported(await fetchJson(keys));
    if (keys !== "discover") return imported(keys);
    const found = await fetchJson(new URL(`${issuer.replace(/\/$/, "")}/.well-known/openid-configuration`));
    if (found["issuer"] !== issuer) throw new Error("the discovery document is of another issuer");
    return imported(await fetchJson(new URL(String(found["jwks_uri"]))));
  }
}

async function fetchJson(url: URL): Promise<Record<string, unknown>> {
  const answer = await fetch(url, { redirect: "error", signal: AbortSignal.timeout(FETCH_TIMEOUT_MS) });
  if (!answer.ok) throw new Error(`${url}: ${answer.status}`);
  return (await answer.json()) as Record<string, unknown>;
}

/** The keys for signatures of an algorithm that Postern has. Others are left out. */
async function imported(document: { readonly keys?: unknown }): Promise<ReadonlyMap<string, PublicKey>> {
  if (!Array.isArray(document.keys)) throw new Error("this is no set of keys");
  const keys = new Map<string, PublicKey>();
  for (const jwk of document.keys as JWK[]) {
    const algorithm = algorithmOf(jwk);
    if (algorithm === undefined || typeof jwk.kid !== "string") continue;
    if ((jwk.alg ?? algorithm) !== algorithm || (jwk.use ?? "sig") !== "sig") continue;
    const { kid, kty, crv, x, y, n, e } = jwk;
    // Nothing else: a private half would make it a key to sign with.
    await importJWK({ kty, crv, x, y, n, e } as JWK, algorithm).then(
      (key) => keys.set(kid, { algorithm, key }),
      () => {},
    );
  }
  return keys;
}

function algorithmOf({ kty, crv }: JWK): PublicKey["algorithm"] | undefined {
  if (kty === "EC" && crv === "P-256") return "ES256";
  if (kty === "OKP" && crv === "Ed25519") return "EdDSA";
  return kty === "RSA" ? "RS256" : undefined;
}
