// Waiting, and asking again. A wait can be given up without an effect on what is waited for.
import { Code } from "@connectrpc/connect";
import { PosternError } from "./errors.js";

/** Milliseconds since 1970. Tests replace it. */
export type Clock = () => number;

const LOST = new Set([
  Code.Unavailable,
  Code.DeadlineExceeded,
  Code.Aborted,
  Code.Canceled,
  Code.Internal,
  Code.Unknown,
]);
const FIRST_PAUSE_MS = 100;
const LONGEST_PAUSE_MS = 5_000;

/** Whether the answer was lost, or the call did not reach Postern. Transports differ in the code that they give then. */
export function isLost(code: Code): boolean {
  return LOST.has(code);
}

/** Settles as the promise does, or rejects when the signal is aborted. What the promise stands for goes on. */
export async function abortable<T>(promise: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (!signal) return promise;
  signal.throwIfAborted();
  let stop = () => {};
  const aborted = new Promise<never>((_, reject) => {
    stop = () => reject(signal.reason);
    signal.addEventListener("abort", stop, { once: true });
  });
  return Promise.race([promise, aborted]).finally(() => signal.removeEventListener("abort", stop));
}

/** Waits. Rejects when the signal is aborted. */
export async function sleep(ms: number, signal?: AbortSignal): Promise<void> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const elapsed = new Promise<void>((resolve) => {
    timer = setTimeout(resolve, ms);
  });
  await abortable(elapsed, signal).finally(() => clearTimeout(timer));
}

/**
 * Makes a call until it is answered, for at most `patienceMs`. A lost answer is asked for again, and so is one that
 * Postern says to ask for again later; any other error is thrown at once, as a `PosternError`.
 */
export async function untilAnswered<T>(call: () => Promise<T>, patienceMs: number): Promise<T> {
  const end = performance.now() + patienceMs;
  for (let attempt = 0; ; attempt++) {
    try {
      return await call();
    } catch (error) {
      const failure = PosternError.from(error);
      const isWorthwhile = isLost(failure.code) || failure.retryDelayMs !== undefined;
      const pause = Math.min(FIRST_PAUSE_MS * 2 ** attempt, LONGEST_PAUSE_MS) * (0.5 + Math.random());
      const delay = (failure.retryDelayMs ?? 0) + pause;
      if (!isWorthwhile || performance.now() + delay > end) throw failure;
      await sleep(delay);
    }
  }
}
