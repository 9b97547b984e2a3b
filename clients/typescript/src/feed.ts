// Follows `TokenService.WatchRevocations`, as docs/guide.md "Revocations" says, and tells whether it is up to date.
import { Code, createClient } from "@connectrpc/connect";
import { PosternError, Reason } from "./errors.js";
import { TokenService } from "./gen/postern/auth/v1/token_service_pb.js";
import { abortable, type Clock, isLost, sleep } from "./repeat.js";
import { RevocationState } from "./revocations.js";
import type { TokenSource } from "./tokens.js";
import type { PosternTransport } from "./transport.js";
import type { Caller, Revocations } from "./verifier.js";

/** A heartbeat comes every 5 s. A stream that is silent for longer than this is ended. */
const SILENCE_MS = 10_000;
/** The pause before the next stream where Postern names none: after a stream that was lost, and after one that was refused. */
const LOST_PAUSE_MS = 1_000;
const REFUSED_PAUSE_MS = 10_000;
const JITTER_MS = 500;

/** Options of `RevocationFeed`. */
export interface FeedOptions {
  /** The gRPC address, by `posternTransport`. */
  readonly transport: PosternTransport;
  /** The tokens of a service account. */
  readonly tokens: TokenSource;
  /**
   * What happens to tokens while revocations may be unknown: before the first heartbeat, and when the last one is too
   * old. `"refuse"`: every token is refused with `UNAVAILABLE`. `"accept"`: tokens are judged by what is known, so that
   * one that was revoked meanwhile is accepted.
   */
  readonly whenUnknown: "refuse" | "accept";
  /** The age from which the last heartbeat is too old, in milliseconds. Default: 30 s, as in Postern itself. */
  readonly maxStalenessMs?: number;
  /** Default: `Date.now`. */
  readonly clock?: Clock;
}

/** What a feed knows, for logs, probes and metrics. */
export interface FeedStatus {
  /** Whether everything is known that was revoked until `maxStalenessMs` ago. */
  readonly isComplete: boolean;
  /** Everything that was revoked before this time is known. */
  readonly completeTime: Date | undefined;
  /** How many sessions, tokens and accounts are remembered. */
  readonly remembered: number;
  /** Why the stream ended last. `undefined` as soon as a message arrives. */
  readonly failure: PosternError | undefined;
}

/** The revocations, as they happen. It follows them from its construction until `close()`. */
export class RevocationFeed implements Revocations {
  readonly #state: RevocationState;
  readonly #clock: Clock;
  readonly #closed = new AbortController();
  readonly #run: Promise<void>;
  #announceComplete = () => {};
  readonly #firstComplete = new Promise<void>((resolve) => {
    this.#announceComplete = resolve;
  });
  #failure: PosternError | undefined;
  #cursor = "";

  constructor(private readonly options: FeedOptions) {
    // JavaScript would take a choice that is missing for "accept".
    if (!["refuse", "accept"].includes(options.whenUnknown)) throw new TypeError("whenUnknown: say refuse or accept");
    this.#clock = options.clock ?? Date.now;
    this.#state = new RevocationState(this.#clock);
    this.#run = this.#follow();
  }

  get status(): FeedStatus {
    const { completeAt, size } = this.#state;
    const completeTime = Number.isFinite(completeAt) ? new Date(completeAt) : undefined;
    return { isComplete: this.#isComplete(), completeTime, remembered: size, failure: this.#failure };
  }

  /** Waits until the feed is complete for the first time. Rejects when the signal is aborted or the feed closed. */
  async ready(options: { signal?: AbortSignal } = {}): Promise<void> {
    const signals = [this.#closed.signal, ...(options.signal ? [options.signal] : [])];
    await abortable(this.#firstComplete, AbortSignal.any(signals));
  }

  check(caller: Caller): Caller {
    // What is known to be revoked stays so, whatever else is unknown.
    const known = this.#state.check(caller);
    if (this.options.whenUnknown === "refuse" && !this.#isComplete()) {
      throw PosternError.refusal(Reason.STORE_UNAVAILABLE, "revocations unknown", this.#failure);
    }
    return known;
  }

  /** Ends the stream, and waits until it has ended. What is known becomes too old. */
  async close(): Promise<void> {
    this.#closed.abort(new PosternError(Code.Canceled, "", "the feed is closed"));
    await this.#run;
  }

  #isComplete(): boolean {
    return this.#clock() - this.#state.completeAt <= (this.options.maxStalenessMs ?? 30_000);
  }

  async #follow(): Promise<void> {
    const { signal } = this.#closed;
    while (!signal.aborted) {
      const failure = await this.#watch().catch(PosternError.from);
      const pause = this.#pauseAfter(failure);
      this.#failure = failure;
      await sleep(pause, signal).catch(() => {});
    }
  }

  /** Follows one stream. Returns or throws what ended it. */
  async #watch(): Promise<PosternError> {
    const token = await this.options.tokens.token({ signal: this.#closed.signal });
    const client = createClient(TokenService, this.options.transport);
    const ending = new AbortController();
    const signal = AbortSignal.any([this.#closed.signal, ending.signal]);
    const silence = setTimeout(() => ending.abort(), SILENCE_MS);
    const headers = { authorization: `Bearer ${token}` };
    try {
      for await (const message of client.watchRevocations({ resumeCursor: this.#cursor }, { headers, signal })) {
        silence.refresh();
        this.#state.apply(message);
        this.#cursor = message.cursor;
        this.#failure = undefined;
        if (this.#isComplete()) this.#announceComplete();
      }
      return new PosternError(Code.Unavailable, "", "the stream of revocations has ended");
    } catch (cause) {
      const error = PosternError.from(cause);
      if (error.code === Code.Unauthenticated) this.options.tokens.discard(token);
      if (error.reason === Reason.CURSOR_EXPIRED) this.#cursor = "";
      if (!ending.signal.aborted) return error;
      // The connection may be dead, and would stay so: drop it.
      this.options.transport.reset();
      return new PosternError(Code.Unavailable, "", "the stream of revocations was silent", { retryDelayMs: 0 });
    } finally {
      clearTimeout(silence);
    }
  }

  #pauseAfter({ code, reason, retryDelayMs }: PosternError): number {
    const wasFollowing = this.#failure === undefined;
    if (wasFollowing && (reason === Reason.TOKEN_EXPIRED || reason === Reason.CURSOR_EXPIRED)) return 0;
    const usual = isLost(code) ? LOST_PAUSE_MS : REFUSED_PAUSE_MS;
    return (retryDelayMs ?? usual) + Math.random() * JITTER_MS;
  }
}
