// The ways to an access token: a service account, an email with a password, or a refresh token. They keep refresh tokens.
import { createClient, type Transport } from "@connectrpc/connect";
import { PosternError, Reason } from "./errors.js";
import { AuthService } from "./gen/postern/auth/v1/auth_service_pb.js";
import type { TokenPair } from "./gen/postern/auth/v1/token_pair_pb.js";
import { TokenService } from "./gen/postern/auth/v1/token_service_pb.js";
import { type Clock, untilAnswered } from "./repeat.js";
import { TokenSource } from "./tokens.js";

/** The longest time that one attempt takes. Postern itself ends a call after 10 s. */
const ATTEMPT_MS = 10_000;

/** Where the newest refresh token of a session is kept. One that outlives the process keeps the user logged in. */
export interface RefreshTokenStore {
  /** The token that was saved last, or `undefined`. */
  load(): string | undefined | Promise<string | undefined>;
  /** Keeps the token, before the access token that came with it is used. `undefined`: the session has ended. */
  save(refreshToken: string | undefined): void | Promise<void>;
}

/** Options of a token source. */
export interface TokenOptions {
  /** How long one renewal repeats a call whose answer was lost, in milliseconds. Default: 30 s. */
  readonly patienceMs?: number;
  /** Default: `Date.now`. */
  readonly clock?: Clock;
}

/** Options of a token source that has a refresh token. */
export interface SessionOptions extends TokenOptions {
  /** Default: memory. A token in the store comes before a password and before a token that is given. */
  readonly store?: RefreshTokenStore;
}

/** The access tokens of a service account (`IssueServiceToken`). */
export function serviceTokens(
  transport: Transport,
  credentials: { readonly clientId: string; readonly clientSecret: string },
  options: TokenOptions = {},
): TokenSource {
  const client = createClient(TokenService, transport);
  const ask = () => client.issueServiceToken(credentials, { timeoutMs: ATTEMPT_MS });
  return new TokenSource(async () => (await untilAnswered(ask, patience(options))).accessToken, options.clock);
}

/** The access tokens of a person who logs in with a password, and again when the session has ended. */
export function loginTokens(
  transport: Transport,
  credentials: { readonly email: string; readonly password: string },
  options: SessionOptions = {},
): TokenSource {
  const client = createClient(AuthService, transport);
  const login = async () => (await client.login(credentials, { timeoutMs: ATTEMPT_MS })).tokens;
  return ofSession(transport, options.store ?? memory(), options, login);
}

/**
 * The access tokens of a session that is open: its refresh token is given, or in the store. When the session has ended,
 * `token()` throws `REFRESH_TOKEN_INVALID`, and the store is empty.
 */
export function sessionTokens(
  transport: Transport,
  session: { readonly refreshToken?: string },
  options: SessionOptions = {},
): TokenSource {
  return ofSession(transport, withFirst(options.store ?? memory(), session.refreshToken), options);
}

function ofSession(
  transport: Transport,
  store: RefreshTokenStore,
  options: SessionOptions,
  login?: () => Promise<TokenPair | undefined>,
): TokenSource {
  const client = createClient(AuthService, transport);
  /** Refreshes with the stored token. `undefined`: there is none, or it is not accepted any more. */
  async function refresh(): Promise<TokenPair | undefined> {
    let refused: string | undefined;
    for (;;) {
      const refreshToken = await store.load();
      if (refreshToken === undefined) return undefined;
      if (refreshToken === refused) break;
      try {
        // Each attempt presents the same token, so that a lost answer is given again.
        const ask = async () => (await client.refresh({ refreshToken }, { timeoutMs: ATTEMPT_MS })).tokens;
        return await untilAnswered(ask, patience(options));
      } catch (error) {
        if (PosternError.from(error).reason !== Reason.REFRESH_TOKEN_INVALID) throw error;
        // Somebody else who has this store may have refreshed meanwhile: look once more.
        refused = refreshToken;
      }
    }
    await store.save(undefined);
    return undefined;
  }
  return new TokenSource(async () => {
    const pair = (await refresh()) ?? (login && (await untilAnswered(login, patience(options))));
    if (!pair) throw PosternError.refusal(Reason.REFRESH_TOKEN_INVALID);
    await store.save(pair.refreshToken);
    return pair.accessToken;
  }, options.clock);
}

function patience({ patienceMs = 30_000 }: TokenOptions): number {
  return patienceMs;
}

function memory(): RefreshTokenStore {
  let kept: string | undefined;
  return {
    load: () => kept,
    save: (refreshToken) => {
      kept = refreshToken;
    },
  };
}

/** A store that begins with a given token, unless it has one. */
function withFirst(store: RefreshTokenStore, first: string | undefined): RefreshTokenStore {
  return {
    load: async () => (await store.load()) ?? first,
    save: async (refreshToken) => {
      await store.save(refreshToken);
      first = undefined;
    },
  };
}
