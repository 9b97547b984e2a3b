// The feed of revocations: its state by messages, its stream against a Postern in memory, and both against the real one.
import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { timestampFromMs } from "@bufbuild/protobuf/wkt";
import { Code, ConnectError, createRouterTransport } from "@connectrpc/connect";
import {
  type Caller,
  type FeedOptions,
  posternTransport,
  RevocationFeed,
  RevocationState,
  serviceTokens,
  TokenSource,
  Verifier,
} from "@postern/client";
import { TokenService, WatchRevocationsResponseSchema } from "@postern/client/stubs";
import { ErrorInfoSchema, RetryInfoSchema } from "../src/gen/google/rpc/error_details_pb.js";
import { type Account, env, newKey, pause, refusal, type Service, stage, until } from "./support.js";

type Message = MessageInitShape<typeof WatchRevocationsResponseSchema>;

const caller: Caller = {
  subject: "ada",
  subjectType: "user",
  clientId: "postern",
  sessionId: "session",
  tokenId: "token",
  username: "ada",
  roles: ["user"],
  expireTime: new Date(),
};

let now = Date.now();
const clock = () => now;

const ended = (sessionId: string, forgetAt = now + 60_000): Message => ({
  cursor: `after ${sessionId}`,
  event: { case: "sessionEnded", value: { sessionId } },
  forgetTime: timestampFromMs(forgetAt),
});
const changed = (roles: string[], disabled = false, forgetAt = now + 60_000): Message => ({
  cursor: `after ${roles}`,
  event: { case: "rolesChanged", value: { userId: "ada", roles, disabled } },
  forgetTime: timestampFromMs(forgetAt),
});
const heartbeat = (at = now): Message => ({
  cursor: `at ${at}`,
  event: { case: "heartbeat", value: { completeTime: timestampFromMs(at) } },
});

function verdict(state: { check(caller: Caller): Caller }): string {
  try {
    return state.check(caller).roles.join();
  } catch (error) {
    return (error as { reason: string }).reason;
  }
}

describe("the state", () => {
  function after(...messages: Message[]): RevocationState {
    const state = new RevocationState(clock);
    for (const message of messages) state.apply(create(WatchRevocationsResponseSchema, message));
    return state;
  }

  test("a session that has ended refuses the tokens with its id as sid or jti, until it is forgotten", () => {
    assert.equal(verdict(after(ended("another"))), "user");
    for (const id of ["session", "token"]) {
      const state = after(ended(id), ended(id));
      assert.equal(verdict(state), "SESSION_REVOKED");
      assert.equal(state.size, 1);
      now += 65_000 - 1;
      assert.equal(verdict(state), "SESSION_REVOKED");
      now += 1;
      assert.equal(verdict(state), "user");
      state.apply(create(WatchRevocationsResponseSchema, heartbeat()));
      assert.equal(state.size, 0);
    }
  });

  test("the last message about an account counts", () => {
    assert.equal(verdict(after(changed(["admin", "user"]))), "admin,user");
    assert.equal(verdict(after(changed(["admin"]), changed([]))), "");
    assert.equal(verdict(after(changed(["user"], true))), "SESSION_REVOKED");
    const state = after(changed([], true), changed(["user", "x"]));
    assert.equal(verdict(state), "user,x");
    now += 65_000;
    assert.equal(verdict(state), "user");
  });

  test("a state that is full is not complete, until what it could not keep does not matter any more", () => {
    const state = new RevocationState(clock, 2);
    const messages = [ended("a"), ended("b"), ended("c", now + 5_000), ended("a"), heartbeat()];
    for (const message of messages) state.apply(create(WatchRevocationsResponseSchema, message));
    assert.deepEqual([state.size, state.completeAt], [2, Number.NEGATIVE_INFINITY]);
    now += 10_000;
    assert.equal(state.completeAt, now - 10_000);
  });

  test("a heartbeat from the future does not vouch for it", () => {
    assert.equal(after(heartbeat(now + 3_600_000)).completeAt, now);
  });
});

describe("the stream", () => {
  const key = newKey();
  type Step = Message | ConnectError;

  /** A Postern whose streams send these, one list after the other. The last one stays open. */
  function play(...streams: Step[][]) {
    const cursors: string[] = [];
    const tokens: (string | null)[] = [];
    const transport = createRouterTransport(({ service }) => {
      service(TokenService, {
        async *watchRevocations({ resumeCursor }, { requestHeader, signal }) {
          cursors.push(resumeCursor);
          tokens.push(requestHeader.get("authorization"));
          for (const step of streams.shift() ?? []) {
            if (step instanceof ConnectError) throw step;
            yield step;
          }
          if (streams.length === 0) await new Promise((resolve) => signal.addEventListener("abort", resolve));
        },
      });
    });
    const source = new TokenSource(async () => (await key).sign());
    const feed = new RevocationFeed({
      transport: { ...transport, reset: () => {} },
      tokens: source,
      whenUnknown: "refuse",
      clock,
    });
    return { feed, cursors, tokens };
  }

  function failure(code: Code, reason?: string, retryNanos?: number): ConnectError {
    return new ConnectError("no", code, undefined, [
      ...(reason ? [{ desc: ErrorInfoSchema, value: { domain: "postern.auth.v1", reason } }] : []),
      ...(retryNanos ? [{ desc: RetryInfoSchema, value: { retryDelay: { nanos: retryNanos } } }] : []),
    ]);
  }

  test("it is complete from the first heartbeat until that is too old", async () => {
    const { feed } = play([changed(["x"]), heartbeat()]);
    assert.equal(verdict(feed), "STORE_UNAVAILABLE");
    assert.equal(feed.status.completeTime, undefined);
    await feed.ready();
    assert.equal(verdict(feed), "x");
    const { failure, ...status } = feed.status;
    assert.deepEqual([status, failure], [{ isComplete: true, completeTime: new Date(now), remembered: 1 }, undefined]);
    now += 30_000;
    assert.equal(verdict(feed), "x");
    now += 1;
    assert.equal(verdict(feed), "STORE_UNAVAILABLE");
    await feed.close();
    await assert.rejects(feed.ready({ signal: AbortSignal.abort() }));
  });

  test("it resumes with the last cursor, after the time that Postern says or a second", async () => {
    const { feed, cursors } = play(
      [heartbeat(), ended("session"), failure(Code.Unavailable, undefined, 50_000_000)],
      [ended("session"), failure(Code.Unavailable)],
      [heartbeat()],
    );
    await until("the second stream", () => cursors.length === 2, 900);
    assert.ok((await until("the third stream", () => cursors.length === 3)) > 900);
    assert.deepEqual(cursors, ["", "after session", "after session"]);
    assert.equal(verdict(feed), "SESSION_REVOKED");
    await feed.close();
  });

  test("an expired token is replaced, and the stream goes on at once", async () => {
    const { feed, cursors, tokens } = play(
      [heartbeat(1), failure(Code.Unauthenticated, "TOKEN_EXPIRED")],
      [heartbeat()],
    );
    await until("the second stream", () => cursors.length === 2, 900);
    assert.deepEqual(cursors, ["", "at 1"]);
    assert.notEqual(tokens[0], tokens[1]);
    await feed.close();
  });

  test("a cursor that is too old is dropped, and what is remembered stays", async () => {
    const { feed, cursors } = play([ended("session"), failure(Code.OutOfRange, "CURSOR_EXPIRED")], [heartbeat()]);
    await feed.ready();
    assert.deepEqual(cursors, ["", ""]);
    assert.equal(verdict(feed), "SESSION_REVOKED");
    await feed.close();
  });

  test("what happens while revocations are unknown must be said", () => {
    const options = { transport: {}, tokens: {} } as FeedOptions;
    assert.throws(() => new RevocationFeed(options), /whenUnknown/);
  });

  test("a feed that is closed is not waited for", async () => {
    const { feed } = play([]);
    const waiting = assert.rejects(feed.ready(), /closed/);
    await feed.close();
    await waiting;
  });
});

describe("the real server", () => {
  async function following(options: Partial<FeedOptions> = {}, address = env("POSTERN_GRPC_ADDR")) {
    const transport = posternTransport(`http://${address}`);
    const credentials = { clientId: env("POSTERN_CLIENT_ID"), clientSecret: env("POSTERN_CLIENT_SECRET") };
    const tokens = serviceTokens(posternTransport(`http://${env("POSTERN_GRPC_ADDR")}`), credentials);
    const feed = new RevocationFeed({ transport, tokens, whenUnknown: "refuse", ...options });
    await feed.ready({ signal: AbortSignal.timeout(10_000) });
    const common = { issuer: env("POSTERN_ISSUER"), audience: env("POSTERN_AUDIENCE") };
    return { feed, verifier: new Verifier({ ...common, revocations: feed }) };
  }

  test("a person who logs out, and one who is disabled, is refused within a second", async () => {
    const { feed, verifier } = await following();
    for (const end of [
      ({ refreshToken }: Account) => stage("/logout", { refreshToken }),
      ({ id }: Account) => stage(`/disable?id=${id}`),
    ]) {
      const person = await stage<Account>("/accounts");
      await verifier.verify(person.accessToken);
      await end(person);
      const refused = async () => (await refusal(verifier.verify(person.accessToken))) === "SESSION_REVOKED";
      await until("the token is refused", refused, 1_000);
    }
    await feed.close();
  });

  test("without the stream the chosen thing happens, and afterwards what happened meanwhile is known", async () => {
    const cut = { maxStalenessMs: 6_000 };
    const refusing = await following({ ...cut }, env("POSTERN_FEED_ADDR"));
    const accepting = await following({ ...cut, whenUnknown: "accept" }, env("POSTERN_FEED_ADDR"));
    const [person, leaving] = [await stage<Account>("/accounts"), await stage<Account>("/accounts")];
    const verdicts = async ({ accessToken }: Account) =>
      Promise.all([refusing, accepting].map(({ verifier }) => refusal(verifier.verify(accessToken))));
    assert.deepEqual(await verdicts(person), ["ACCEPTED", "ACCEPTED"]);
    await stage("/feed/cut");
    try {
      await stage("/logout", { refreshToken: leaving.refreshToken });
      await until("the feed is too old", () => !refusing.feed.status.isComplete);
      assert.deepEqual(await verdicts(person), ["STORE_UNAVAILABLE", "ACCEPTED"]);
      assert.deepEqual(await verdicts(leaving), ["STORE_UNAVAILABLE", "ACCEPTED"]);
      assert.notEqual(refusing.feed.status.failure, undefined);
    } finally {
      await stage("/feed/restore");
    }
    await until("the feeds recover", () => refusing.feed.status.isComplete && accepting.feed.status.isComplete);
    assert.deepEqual(await verdicts(person), ["ACCEPTED", "ACCEPTED"]);
    assert.deepEqual(await verdicts(leaving), ["SESSION_REVOKED", "SESSION_REVOKED"]);
    assert.equal(refusing.feed.status.failure, undefined);
    await Promise.all([refusing.feed.close(), accepting.feed.close()]);
  });

  test("a service whose account is disabled is told so", async () => {
    const { clientId, clientSecret } = await stage<Service>("/services");
    const transport = posternTransport(`http://${env("POSTERN_GRPC_ADDR")}`);
    const tokens = serviceTokens(transport, { clientId, clientSecret });
    const { feed } = await following({ tokens });
    await stage(`/disable?id=${clientId}`);
    await until("it is told", () => feed.status.failure?.reason === "SESSION_REVOKED");
    await pause(0);
    await feed.close();
  });
});
