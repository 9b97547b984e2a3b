// A network that swallows everything: the connections stay open, and nothing arrives any more.
import assert from "node:assert/strict";
import { createServer, type Socket, connect as tcpConnect } from "node:net";
import { after, describe, test } from "node:test";
import { posternTransport, RevocationFeed, serviceTokens } from "@postern/client";
import { env, pause, until } from "./support.js";

/** A feed through a proxy, and both ends of the connections that it has opened. */
async function following() {
  const sockets: Socket[] = [];
  const proxy = createServer((client) => {
    const [host, port] = env("POSTERN_GRPC_ADDR").split(":");
    const server = tcpConnect(Number(port), host);
    client.pipe(server).pipe(client);
    for (const socket of [client, server]) sockets.push(socket.on("error", () => {}));
  });
  await new Promise<void>((resolve) => proxy.listen(0, "127.0.0.1", resolve));
  after(() => {
    for (const socket of sockets) socket.destroy();
    proxy.close();
  });
  const { port } = proxy.address() as { port: number };
  const transport = posternTransport(`http://127.0.0.1:${port}`);
  const credentials = { clientId: env("POSTERN_CLIENT_ID"), clientSecret: env("POSTERN_CLIENT_SECRET") };
  const feed = new RevocationFeed({ transport, tokens: serviceTokens(transport, credentials), whenUnknown: "refuse" });
  await feed.ready();
  return { feed, sockets };
}

describe("a stream", { concurrency: true }, () => {
  test("that says nothing for ten seconds is ended, and another connection is opened", async () => {
    const { feed, sockets } = await following();
    for (const socket of sockets) socket.unpipe().pause();
    const silentSince = Date.now();
    const isFollowing = () => (feed.status.completeTime?.getTime() ?? 0) > silentSince + 9_000;
    const took = await until("the feed goes on", isFollowing, 13_000);
    assert.ok(took > 9_000, `${took} ms`);
    assert.equal(sockets.length, 4);
    await feed.close();
  });

  test("whose heartbeats come goes on", async () => {
    const { feed } = await following();
    for (let round = 0; round < 130; round++) {
      assert.equal(feed.status.failure, undefined);
      await pause(100);
    }
    await feed.close();
  });
});
