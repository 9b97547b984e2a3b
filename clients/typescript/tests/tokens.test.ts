// Token sources: against a Postern in memory that loses answers, and against the real one.
import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { Code, ConnectError, createClient, createRouterTransport, type Interceptor } from "@connectrpc/connect";
import {
  loginTokens,
  type PosternError,
  posternTransport,
  type RefreshTokenStore,
  serviceTokens,
  sessionTokens,
  TokenSource,
  withToken,
} from "@postern/client";
import { AuthService, TokenService } from "@postern/client/stubs";
import { ErrorInfoSchema, RetryInfoSchema } from "../src/gen/google/rpc/error_details_pb.js";
import { type Account, env, newKey, pause, refusal, type Service, stage, until } from "./support.js";

let now = Date.now();
const clock = () => now;
const key = await newKey(clock);

function failure(code: Code, reason?: string, retrySeconds?: number): ConnectError {
  return new ConnectError("no", code, undefined, [
    ...(reason ? [{ desc: ErrorInfoSchema, value: { domain: "postern.auth.v1", reason } }] : []),
    ...(retrySeconds === undefined
      ? []
      : [{ desc: RetryInfoSchema, value: { retryDelay: { seconds: BigInt(retrySeconds) } } }]),
  ]);
}

/** A Postern in memory. A refresh token works once; presented again, it gets the same answer. */
class FakePostern {
  logins = 0;
  /** The refresh tokens that were presented. */
  readonly presented: string[] = [];
  /** What the next calls end with, after they were carried out. */
  readonly lost: ConnectError[] = [];
  isRefused = false;
  delayMs = 0;
  readonly #answers = new Map<string, string>();
  #made = 0;

  readonly transport = createRouterTransport(({ service }) => {
    service(AuthService, {
      login: async () => {
        this.logins++;
        return this.#answer({ tokens: { accessToken: await key.sign(), refreshToken: this.#next() } });
      },
      refresh: async ({ refreshToken }) => {
        this.presented.push(refreshToken);
        if (this.isRefused) throw failure(Code.Unauthenticated, "REFRESH_TOKEN_INVALID");
        const next = this.#answers.get(refreshToken) ?? this.#next();
        this.#answers.set(refreshToken, next);
        return this.#answer({ tokens: { accessToken: await key.sign(), refreshToken: next } });
      },
    });
    service(TokenService, {
      issueServiceToken: async () => {
        this.logins++;
        return this.#answer({ accessToken: await key.sign() });
      },
    });
  });

  #next(): string {
    return `r${++this.#made}`;
  }

  async #answer<T>(answer: T): Promise<T> {
    await pause(this.delayMs);
    const error = this.lost.shift();
    if (error) throw error;
    return answer;
  }
}

class MemoryStore implements RefreshTokenStore {
  readonly saved: (string | undefined)[] = [];
  load() {
    return this.saved.at(-1);
  }
  save(token: string | undefined) {
    this.saved.push(token);
  }
}

const ada = { email: "ada@example.com", password: "secret" };
const client = { clientId: "c", clientSecret: "s" };

describe("renewal", () => {
  test("a thousand callers share one call, and get the same token until it is old", async () => {
    const postern = new FakePostern();
    postern.delayMs = 20;
    const tokens = serviceTokens(postern.transport, client, { clock });
    const all = await Promise.all(Array.from({ length: 1_000 }, () => tokens.token()));
    assert.equal(new Set(all).size, 1);
    now += (900 - 61) * 1_000;
    assert.equal(await tokens.token(), all[0]);
    assert.equal(postern.logins, 1);
  });

  test("the token is renewed a minute ahead, and short ones when a fifth is left", async () => {
    for (const [lifetime, ahead] of [
      [900, 60],
      [100, 20],
    ] as const) {
      let made = 0;
      const tokens = new TokenSource(() => {
        made++;
        return key.sign({ exp: Math.floor(now / 1_000) + lifetime });
      }, clock);
      const first = await tokens.token();
      now += (lifetime - ahead) * 1_000 - 1;
      await tokens.token();
      assert.equal(made, 1);
      now += 1_000;
      assert.equal(await tokens.token(), first, "the old one is valid, and nobody waits");
      await until("another one", async () => (await tokens.token()) !== first);
      assert.equal(made, 2);
    }
  });

  test("while the token is valid a renewal that fails hands it out; after that it throws", async () => {
    let isDown = false;
    const tokens = new TokenSource(() => (isDown ? Promise.reject(failure(Code.Unavailable)) : key.sign()), clock);
    const first = await tokens.token();
    isDown = true;
    now += 850_000;
    for (let round = 0; round < 3; round++) {
      assert.equal(await tokens.token(), first);
      await pause(5);
      now += 2_000;
    }
    now += 50_000;
    assert.equal(await refusal(tokens.token()), "code 14");
    isDown = false;
    now += 1_000;
    assert.notEqual(await tokens.token(), first);
  });

  test("a caller that gives up does not end the renewal of the others", async () => {
    const postern = new FakePostern();
    postern.delayMs = 100;
    const tokens = serviceTokens(postern.transport, client, { clock });
    const waiting = tokens.token();
    await assert.rejects(tokens.token({ signal: AbortSignal.timeout(10) }), { name: "TimeoutError" });
    await waiting;
    // With a valid token there is nothing to wait for.
    await tokens.token({ signal: AbortSignal.abort() });
    assert.equal(postern.logins, 1);
  });

  test("a renewal that was refused is not asked for again at once", async () => {
    let asked = 0;
    const tokens = new TokenSource(() => {
      asked++;
      return Promise.reject(failure(Code.Unauthenticated, "INVALID_CLIENT"));
    }, clock);
    for (let round = 0; round < 10; round++) assert.equal(await refusal(tokens.token()), "INVALID_CLIENT");
    assert.equal(asked, 1);
    now += 1_000;
    await refusal(tokens.token());
    assert.equal(asked, 2);
  });

  test("a clock that differs from that of Postern changes nothing", async () => {
    let made = 0;
    const tokens = new TokenSource(() => {
      made++;
      return key.sign({ iat: 1_000, exp: 1_900 });
    }, clock);
    const first = await tokens.token();
    now += 800_000;
    assert.equal(await tokens.token(), first);
    assert.equal(made, 1);
  });
});

describe("sessions", () => {
  test("each refresh token is saved before the access token is handed out, and presented once", async () => {
    const postern = new FakePostern();
    const store = new MemoryStore();
    const tokens = loginTokens(postern.transport, ada, { clock, store });
    for (let round = 0; round < 3; round++) {
      const token = await tokens.token();
      assert.equal(store.saved.length, round + 1);
      tokens.discard(token);
    }
    assert.deepEqual(store.saved, ["r1", "r2", "r3"]);
    assert.deepEqual(postern.presented, ["r1", "r2"]);
    assert.equal(postern.logins, 1);
  });

  test("a refresh token that cannot be saved hands out nothing, and is asked for again", async () => {
    const postern = new FakePostern();
    const store = new MemoryStore();
    store.save("r0");
    const save = store.save;
    store.save = () => {
      throw new Error("the disk is full");
    };
    const tokens = sessionTokens(postern.transport, {}, { clock, store });
    await assert.rejects(tokens.token(), /disk is full/);
    store.save = save;
    now += 1_000;
    await tokens.token();
    assert.deepEqual(postern.presented, ["r0", "r0"]);
    assert.deepEqual(store.saved, ["r0", "r1"]);
  });

  test("an answer that was lost is asked for again with the same refresh token", async () => {
    const postern = new FakePostern();
    const tokens = sessionTokens(postern.transport, { refreshToken: "r0" }, { clock });
    postern.lost.push(failure(Code.Unavailable), failure(Code.DeadlineExceeded), failure(Code.Aborted));
    tokens.discard(await tokens.token());
    assert.deepEqual(postern.presented, ["r0", "r0", "r0", "r0"]);
    await tokens.token();
    assert.equal(postern.presented.at(-1), "r1");
  });

  test("it waits as long as Postern says", async () => {
    const postern = new FakePostern();
    const tokens = sessionTokens(postern.transport, { refreshToken: "r0" }, { clock });
    postern.lost.push(failure(Code.Unavailable, "STORE_UNAVAILABLE", 1));
    const begun = performance.now();
    await tokens.token();
    const took = performance.now() - begun;
    assert.ok(took >= 1_000 && took < 2_000, `${took} ms`);
  });

  test("when nothing is answered it is no logout, and the token is kept", async () => {
    const postern = new FakePostern();
    const store = new MemoryStore();
    const tokens = sessionTokens(postern.transport, { refreshToken: "r0" }, { clock, store, patienceMs: 200 });
    postern.lost.push(...Array.from({ length: 9 }, () => failure(Code.Unavailable)));
    await assert.rejects(tokens.token(), (error: PosternError) => error.code === Code.Unavailable);
    assert.deepEqual(store.saved, []);
    postern.lost.length = 0;
    now += 1_000;
    await tokens.token();
    assert.deepEqual(new Set(postern.presented), new Set(["r0"]));
  });

  test("the end of the session is told, and empties the store", async () => {
    const postern = new FakePostern();
    const store = new MemoryStore();
    store.save("r0");
    const tokens = sessionTokens(postern.transport, {}, { clock, store });
    postern.isRefused = true;
    assert.equal(await refusal(tokens.token()), "REFRESH_TOKEN_INVALID");
    assert.deepEqual(store.saved, ["r0", undefined]);
    assert.equal(postern.presented.length, 1);
  });

  test("a login with a password logs in again", async () => {
    const postern = new FakePostern();
    const tokens = loginTokens(postern.transport, ada, { clock });
    tokens.discard(await tokens.token());
    postern.isRefused = true;
    await tokens.token();
    assert.deepEqual([postern.logins, postern.presented], [2, ["r1"]]);
  });

  test("a token that another process has rotated meanwhile is taken from the store", async () => {
    const postern = new FakePostern();
    const saved = ["r0", "r9"];
    const store = { load: () => (saved.length > 1 ? saved.shift() : saved[0]), save: () => {} };
    const tokens = sessionTokens(postern.transport, {}, { clock, store });
    postern.isRefused = true;
    assert.equal(await refusal(tokens.token()), "REFRESH_TOKEN_INVALID");
    assert.deepEqual(postern.presented, ["r0", "r9"]);
  });
});

describe("the real server", () => {
  const address = () => `http://${env("POSTERN_GRPC_ADDR")}`;

  test("the tokens of a service and of a person are accepted", async () => {
    const transport = posternTransport(address());
    const { clientId, clientSecret } = await stage<Service>("/services");
    await serviceTokens(transport, { clientId, clientSecret }).token();
    const person = await stage<Account>("/accounts");
    const tokens = loginTokens(transport, person);
    const me = createClient(AuthService, posternTransport(address(), { interceptors: [withToken(tokens)] }));
    assert.equal((await me.getMe({})).user?.email, person.email);
    assert.equal(
      await refusal(serviceTokens(transport, { clientId, clientSecret: "wrong" }).token()),
      "INVALID_CLIENT",
    );
  });

  test("an answer that was lost on the way does not log the person out", async () => {
    const presented: string[] = [];
    let drops = 2;
    const drop: Interceptor = (next) => async (request) => {
      const answer = await next(request);
      if (request.method.name !== "Refresh") return answer;
      presented.push((request.message as unknown as { refreshToken: string }).refreshToken);
      if (drops-- > 0) throw new ConnectError("the connection broke", Code.Unavailable);
      return answer;
    };
    const transport = posternTransport(address(), { interceptors: [drop] });
    const { refreshToken, email } = await stage<Account>("/accounts");
    const tokens = sessionTokens(transport, { refreshToken });
    const me = createClient(AuthService, posternTransport(address(), { interceptors: [withToken(tokens)] }));
    assert.equal((await me.getMe({})).user?.email, email);
    assert.deepEqual(presented, [refreshToken, refreshToken, refreshToken]);
    tokens.discard(await tokens.token());
    assert.equal((await me.getMe({})).user?.email, email);
  });

  test("after a logout a session has ended, and a login begins another one", async () => {
    const transport = posternTransport(address());
    const person = await stage<Account>("/accounts");
    const store = new MemoryStore();
    store.save(person.refreshToken);
    const [session, login] = [sessionTokens(transport, person), loginTokens(transport, person, { store })];
    await stage("/logout", { refreshToken: person.refreshToken });
    assert.equal(await refusal(session.token()), "REFRESH_TOKEN_INVALID");
    await login.token();
    assert.equal(store.saved.length, 3);
  });
});
