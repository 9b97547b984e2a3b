// The interceptors: servers of grpc-js and of Connect, called by clients of both, with a unary method, a stream, a method
// that is public, and one for which nothing is declared.
import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer as createHttp2Server, type Http2Server, type ServerHttp2Session } from "node:http2";
import type { AddressInfo } from "node:net";
import { after, describe, test } from "node:test";
import { create, type DescMethod, fromBinary, toBinary } from "@bufbuild/protobuf";
import { Code, ConnectError, createClient, type HandlerContext } from "@connectrpc/connect";
import { connectNodeAdapter } from "@connectrpc/connect-node";
import * as grpc from "@grpc/grpc-js";
import {
  callerOf,
  type Demands,
  guard,
  PosternError,
  posternTransport,
  TokenSource,
  Verifier,
  withToken,
} from "@postern/client";
import * as grpcJs from "@postern/client/grpc-js";
import {
  AuthService,
  GetMeResponseSchema,
  LogoutResponseSchema,
  TokenService,
  WatchRevocationsResponseSchema,
} from "@postern/client/stubs";
import type { JWTPayload } from "jose";
import { AUDIENCE, ISSUER, newKey, pause, refusal, serviceClaims } from "./support.js";

const key = await newKey();
const verifier = new Verifier({ issuer: ISSUER, audience: AUDIENCE, keys: { keys: [key.jwk] }, revocations: "none" });
const demands: Demands = {
  "/postern.auth.v1.AuthService/GetMe": { access: "user" },
  "/postern.auth.v1.AuthService/Logout": { access: "public" },
  "/postern.auth.v1.TokenService/WatchRevocations": { access: "service" },
};
const person = new TokenSource(() => key.sign());
const service = new TokenSource(() => key.sign(serviceClaims()));
const nobody = new TokenSource(() => Promise.reject(new ConnectError("no token today", Code.Unavailable)));

/** What grpc-js wants to know of a method. */
function definition({ parent, name, methodKind, input, output }: DescMethod) {
  return {
    path: `/${parent.typeName}/${name}`,
    requestStream: methodKind === "client_streaming" || methodKind === "bidi_streaming",
    responseStream: methodKind === "server_streaming" || methodKind === "bidi_streaming",
    requestSerialize: (message: unknown) => Buffer.from(toBinary(input, message as never)),
    requestDeserialize: (bytes: Buffer) => fromBinary(input, bytes),
    responseSerialize: (message: unknown) => Buffer.from(toBinary(output, message as never)),
    responseDeserialize: (bytes: Buffer) => fromBinary(output, bytes),
  };
}
const { getMe, logout, signUp } = AuthService.method;
const { watchRevocations } = TokenService.method;
const definitions = {
  getMe: definition(getMe),
  logout: definition(logout),
  signUp: definition(signUp),
  watchRevocations: definition(watchRevocations),
};

async function grpcJsServer(): Promise<string> {
  const server = new grpc.Server({ interceptors: [grpcJs.guard(verifier, demands)] });
  server.addService(definitions, {
    getMe: (call: grpc.ServerUnaryCall<unknown, unknown>, reply: grpc.sendUnaryData<unknown>) =>
      reply(null, create(GetMeResponseSchema, { user: { id: callerOf(call).subject } })),
    logout: (_: unknown, reply: grpc.sendUnaryData<unknown>) => reply(null, create(LogoutResponseSchema)),
    signUp: (_: unknown, reply: grpc.sendUnaryData<unknown>) => reply(new Error("this is reached by nobody")),
    watchRevocations: (call: grpc.ServerWritableStream<unknown, unknown>) => {
      for (let index = 0; index < 3; index++)
        call.write(create(WatchRevocationsResponseSchema, { cursor: callerOf(call).subject }));
      call.end();
    },
  });
  const port = await new Promise<number>((resolve, reject) =>
    server.bindAsync("127.0.0.1:0", grpc.ServerCredentials.createInsecure(), (error, bound) =>
      error ? reject(error) : resolve(bound),
    ),
  );
  after(() => server.forceShutdown());
  return `127.0.0.1:${port}`;
}

async function connectServer(): Promise<string> {
  const server: Http2Server = createHttp2Server(
    connectNodeAdapter({
      interceptors: [guard(verifier, demands)],
      routes: (router) => {
        router.service(AuthService, {
          getMe: (_, context: HandlerContext) => ({ user: { id: callerOf(context).subject } }),
          logout: () => ({}),
        });
        router.service(TokenService, {
          async *watchRevocations(_, context) {
            for (let index = 0; index < 3; index++) yield { cursor: callerOf(context).subject };
          },
        });
      },
    }),
  );
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  const sessions = new Set<ServerHttp2Session>();
  server.on("session", (session) => sessions.add(session));
  after(() => {
    server.close();
    for (const session of sessions) session.destroy();
  });
  return `127.0.0.1:${(server.address() as AddressInfo).port}`;
}

/** A client with a token source, in the same shape for both libraries. */
interface Calls {
  me(): Promise<string>;
  logout(): Promise<unknown>;
  signUp(): Promise<unknown>;
  watch(): Promise<string[]>;
}

function byConnect(address: string, tokens?: TokenSource): Calls {
  const transport = posternTransport(`http://${address}`, { interceptors: tokens ? [withToken(tokens)] : [] });
  const [auth, token] = [createClient(AuthService, transport), createClient(TokenService, transport)];
  return {
    me: async () => (await auth.getMe({})).user?.id ?? "",
    logout: () => auth.logout({}),
    signUp: () => auth.signUp({}),
    watch: async () => {
      const found: string[] = [];
      for await (const { cursor } of token.watchRevocations({})) found.push(cursor);
      return found;
    },
  };
}

function grpcJsClient(address: string, tokens?: TokenSource) {
  const client = new grpc.Client(address, grpc.credentials.createInsecure(), {
    interceptors: tokens ? [grpcJs.withToken(tokens)] : [],
  });
  after(() => client.close());
  return client;
}

function byGrpcJs(address: string, tokens?: TokenSource): Calls {
  const client = grpcJsClient(address, tokens);
  function unary(method: DescMethod): Promise<unknown> {
    const { path, requestSerialize, responseDeserialize } = definition(method);
    return new Promise((resolve, reject) =>
      client.makeUnaryRequest(path, requestSerialize, responseDeserialize, create(method.input), (error, answer) =>
        error ? reject(error) : resolve(answer),
      ),
    );
  }
  return {
    me: async () => ((await unary(getMe)) as { user: { id: string } }).user.id,
    logout: () => unary(logout),
    signUp: () => unary(signUp),
    watch: async () => {
      const { path, requestSerialize, responseDeserialize } = definition(watchRevocations);
      const found: string[] = [];
      const stream = client.makeServerStreamRequest(
        path,
        requestSerialize,
        responseDeserialize,
        create(watchRevocations.input),
      );
      for await (const message of stream) found.push((message as { cursor: string }).cursor);
      return found;
    },
  };
}

const servers = { "grpc-js": await grpcJsServer(), Connect: await connectServer() };
for (const [serverName, address] of Object.entries(servers)) {
  for (const [clientName, calls] of Object.entries({ "grpc-js": byGrpcJs, Connect: byConnect })) {
    test(`a client of ${clientName} calls a server of ${serverName}`, async () => {
      const [asNobody, asPerson, asService] = [calls(address), calls(address, person), calls(address, service)];
      const subject = (await verifier.verify(await person.token())).subject;
      assert.equal(await asPerson.me(), subject);
      assert.deepEqual(
        new Set(await asService.watch()),
        new Set([(await verifier.verify(await service.token())).subject]),
      );
      assert.equal((await asService.watch()).length, 3);
      await Promise.all([asNobody.logout(), asPerson.logout()]);
      assert.equal(await refusal(asNobody.me()), "TOKEN_MISSING");
      assert.equal(await refusal(asNobody.watch()), "TOKEN_MISSING");
      assert.equal(await refusal(asService.me()), "USER_REQUIRED");
      assert.equal(await refusal(asPerson.watch()), "SERVICE_REQUIRED");
      assert.equal(await refusal(asNobody.signUp()), "ROLE_REQUIRED");
      assert.equal(await refusal(asPerson.signUp()), "ROLE_REQUIRED", "nothing is declared for it");
      await assert.rejects(asPerson.watch(), (error) => {
        const { code, message } = PosternError.from(error);
        assert.deepEqual([code, message.startsWith("this call is for services")], [Code.PermissionDenied, true]);
        return true;
      });
    });
  }

  test(`a token source that fails is the failure of the call, to a server of ${serverName}`, async () => {
    for (const calls of [byGrpcJs(address, nobody), byConnect(address, nobody)]) {
      for (const call of [calls.me, calls.watch]) {
        await assert.rejects(call(), (error) => {
          const { code, message } = PosternError.from(error);
          assert.deepEqual([code, message], [Code.Unavailable, "no token today"]);
          return true;
        });
      }
    }
  });
}

describe("a call of grpc-js that waits for its token", () => {
  const slow = new TokenSource(async () => {
    await pause(300);
    return key.sign();
  });
  const { path, requestSerialize, responseDeserialize } = definition(getMe);
  function call(options: grpc.CallOptions, cancelAfterMs?: number): Promise<number> {
    const client = grpcJsClient(servers["grpc-js"], slow);
    return new Promise((resolve) => {
      const made = client.makeUnaryRequest(
        path,
        requestSerialize,
        responseDeserialize,
        create(getMe.input),
        options,
        (error) => resolve(error?.code ?? 0),
      );
      if (cancelAfterMs !== undefined) setTimeout(() => made.cancel(), cancelAfterMs);
    });
  }

  test("ends at its deadline", async () => {
    assert.equal(await call({ deadline: Date.now() + 100 }), grpc.status.DEADLINE_EXCEEDED);
  });

  test("ends when it is cancelled", async () => {
    assert.equal(await call({}, 50), grpc.status.CANCELLED);
  });

  test("is made when the token is there", async () => {
    assert.equal(await call({ deadline: Date.now() + 5_000 }), grpc.status.OK);
  });
});

test("a stream in both directions waits for the token, and keeps what is written meanwhile", async () => {
  const echo = {
    path: "/test.v1.Test/Echo",
    requestStream: true,
    responseStream: true,
    requestSerialize: (text: string) => Buffer.from(text),
    requestDeserialize: String,
    responseSerialize: (text: string) => Buffer.from(text),
    responseDeserialize: String,
  };
  const server = new grpc.Server({ interceptors: [grpcJs.guard(verifier, { [echo.path]: { access: "service" } })] });
  server.addService({ echo }, { echo: (call: grpc.ServerDuplexStream<string, string>) => void call.pipe(call) });
  const port = await new Promise<number>((resolve) =>
    server.bindAsync("127.0.0.1:0", grpc.ServerCredentials.createInsecure(), (_, bound) => resolve(bound)),
  );
  after(() => server.forceShutdown());
  async function send(claims: JWTPayload): Promise<string[]> {
    const slow = new TokenSource(async () => {
      await pause(50);
      return key.sign(claims);
    });
    const client = grpcJsClient(`127.0.0.1:${port}`, slow);
    const stream = client.makeBidiStreamRequest(echo.path, echo.requestSerialize, echo.responseDeserialize);
    for (const text of ["a", "b", "c"]) stream.write(text);
    stream.end();
    const found: string[] = [];
    for await (const text of stream) found.push(text as string);
    return found;
  }
  assert.deepEqual(await send(serviceClaims()), ["a", "b", "c"]);
  assert.equal(await refusal(send({})), "SERVICE_REQUIRED");
});
