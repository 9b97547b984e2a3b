// Access tokens for outgoing calls: when to renew them, and how often to ask. It runs in browsers too.
import { decodeJwt } from "jose";
import { PosternError } from "./errors.js";
import { abortable, type Clock } from "./repeat.js";

/** A token is renewed when this part of its lifetime is left, but not earlier than a minute before its end. */
const RENEWAL_PART = 5;
const LONGEST_AHEAD_MS = 60_000;
/** The pause after a renewal that failed, if Postern names none. */
const FAILED_PAUSE_MS = 1_000;

interface Issued {
  readonly token: string;
  readonly renewAt: number;
  readonly expireAt: number;
}

/** Gets an access token. A `TokenSource` calls it once at a time. Throws a `PosternError`. */
export type Grant = () => Promise<string>;

/**
 * An access token that is always valid: it is renewed ahead of time, and once for all callers that wait.
 *
 * Make one with `serviceTokens`, `loginTokens` or `sessionTokens`, and keep it: each has a token of its own.
 */
export class TokenSource {
  #issued: Issued | undefined;
  #renewal: Promise<string> | undefined;
  #failure: { readonly error: PosternError; readonly until: number } | undefined;

  constructor(
    private readonly grant: Grant,
    private readonly clock: Clock = Date.now,
  ) {}

  /**
   * The access token. As long as the current one is valid it is returned at once, also while it is being renewed and
   * when that fails. Without a valid one this waits for the renewal, and throws its `PosternError`: `UNAVAILABLE` when
   * Postern did not answer, and `REFRESH_TOKEN_INVALID`, `INVALID_CREDENTIALS` or `INVALID_CLIENT` when it refused.
   * The signal ends the wait of this caller, and not the renewal.
   */
  async token(options: { signal?: AbortSignal | undefined } = {}): Promise<string> {
    const now = this.clock();
    const current = this.#issued && now < this.#issued.expireAt ? this.#issued : undefined;
    if (current && now < current.renewAt) return current.token;
    const failure = this.#failure && now < this.#failure.until ? this.#failure : undefined;
    if (!this.#renewal && failure) {
      if (current) return current.token;
      throw failure.error;
    }
    this.#renewal ??= this.#renew().finally(() => {
      this.#renewal = undefined;
    });
    if (!current) return abortable(this.#renewal, options.signal);
    this.#renewal.catch(() => {});
    return current.token;
  }

  /** Drops this token, because Postern does not accept it any more. The next call of `token` gets another one. */
  discard(token: string): void {
    if (this.#issued?.token === token) this.#issued = undefined;
  }

  async #renew(): Promise<string> {
    // The lifetime is counted from before the call, on this machine's clock, which may differ from that of Postern.
    const askedAt = this.clock();
    try {
      const token = await this.grant();
      const { iat = 0, exp = 0 } = decodeJwt(token);
      const lifetime = (exp - iat) * 1_000;
      const expireAt = askedAt + lifetime;
      this.#issued = { token, expireAt, renewAt: expireAt - Math.min(lifetime / RENEWAL_PART, LONGEST_AHEAD_MS) };
      this.#failure = undefined;
      return token;
    } catch (cause) {
      const error = PosternError.from(cause);
      this.#failure = { error, until: this.clock() + (error.retryDelayMs ?? FAILED_PAUSE_MS) };
      throw error;
    }
  }
}
