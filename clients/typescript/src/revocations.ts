// What is known of revocations: which sessions have ended, and which accounts have other roles. It knows no network.
import { timestampMs } from "@bufbuild/protobuf/wkt";
import { PosternError, Reason } from "./errors.js";
import type { WatchRevocationsResponse } from "./gen/postern/auth/v1/token_service_pb.js";
import type { Clock } from "./repeat.js";
import type { Caller, Revocations } from "./verifier.js";

const LEEWAY_MS = 5_000;
const SWEEP_INTERVAL_MS = 60_000;
/** About 200 MB of revocations. */
const MOST_ENTRIES = 1_000_000;

interface Standing {
  /** The roles that the account has now. `undefined`: all of its tokens are refused. */
  readonly roles: readonly string[] | undefined;
  readonly forgetAt: number;
}

/** The revocations that messages of `WatchRevocations` have told. Messages may come again. */
export class RevocationState implements Revocations {
  /** `sid` or `jti`, and when it can be forgotten. */
  readonly #ended = new Map<string, number>();
  /** By `sub`. */
  readonly #standings = new Map<string, Standing>();
  #completeAt = Number.NEGATIVE_INFINITY;
  #sweptAt = 0;
  /** Until then, something is missing that found no room. */
  #lackingUntil = 0;

  constructor(
    private readonly clock: Clock = Date.now,
    private readonly mostEntries: number = MOST_ENTRIES,
  ) {}

  /** How many sessions, tokens and accounts are remembered. */
  get size(): number {
    return this.#ended.size + this.#standings.size;
  }

  /** Everything that was revoked before this time is known, in milliseconds since 1970. Before the first heartbeat: -∞. */
  get completeAt(): number {
    return this.clock() < this.#lackingUntil ? Number.NEGATIVE_INFINITY : this.#completeAt;
  }

  /** Takes a message in. */
  apply({ event, forgetTime }: WatchRevocationsResponse): void {
    const forgetAt = forgetTime ? timestampMs(forgetTime) + LEEWAY_MS : Number.POSITIVE_INFINITY;
    switch (event.case) {
      case "sessionEnded":
        if (this.#hasRoom(this.#ended.has(event.value.sessionId), forgetAt))
          this.#ended.set(event.value.sessionId, forgetAt);
        break;
      case "rolesChanged": {
        const { userId, roles, disabled } = event.value;
        if (!this.#hasRoom(this.#standings.has(userId), forgetAt)) break;
        this.#standings.set(userId, { roles: disabled ? undefined : Object.freeze([...roles]), forgetAt });
        break;
      }
      case "heartbeat":
        // If the clock of this machine is slow, the time is that of the message's arrival, and not a later one.
        if (event.value.completeTime) this.#completeAt = Math.min(timestampMs(event.value.completeTime), this.clock());
        this.#sweep();
        break;
      case undefined:
        // An event that a newer Postern has. It is not about sessions and roles, or it comes with one that is.
        break;
    }
  }

  check(caller: Caller): Caller {
    const now = this.clock();
    if (this.#isEnded(caller.sessionId, now) || this.#isEnded(caller.tokenId, now)) {
      throw PosternError.refusal(Reason.SESSION_REVOKED);
    }
    const standing = this.#standings.get(caller.subject);
    if (!standing || standing.forgetAt <= now) return caller;
    if (!standing.roles) throw PosternError.refusal(Reason.SESSION_REVOKED);
    return Object.freeze({ ...caller, roles: standing.roles });
  }

  #isEnded(id: string, now: number): boolean {
    return (this.#ended.get(id) ?? 0) > now;
  }

  #hasRoom(isKnown: boolean, forgetAt: number): boolean {
    const hasRoom = isKnown || this.size < this.mostEntries;
    if (!hasRoom) this.#lackingUntil = Math.max(this.#lackingUntil, forgetAt);
    return hasRoom;
  }

  #sweep(): void {
    const now = this.clock();
    if (now - this.#sweptAt < SWEEP_INTERVAL_MS) return;
    this.#sweptAt = now;
    for (const [id, forgetAt] of this.#ended) if (forgetAt <= now) this.#ended.delete(id);
    for (const [id, { forgetAt }] of this.#standings) if (forgetAt <= now) this.#standings.delete(id);
  }
}
