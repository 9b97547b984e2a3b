// The library in a real browser (Debian's chromium, without a driver), against the HTTP address of the real server.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, rm } from "node:fs/promises";
import { createServer, type Server } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { text } from "node:stream/consumers";
import { after, test } from "node:test";
import { build } from "esbuild";
import { env, listen } from "./support.js";

/** The ports whose origins the stage allows to call. */
const PORTS = [9455, 9456, 9457, 9458, 9459];

/** The page as one file. Bundling for browsers fails if anything needs a module of Node. */
async function bundled(): Promise<string> {
  const options = { bundle: true, minify: true, platform: "browser", format: "esm", write: false } as const;
  const made = await build({ ...options, entryPoints: [join(import.meta.dirname, "page/page.js")], metafile: true });
  const inputs = Object.keys(made.metafile.inputs);
  assert.ok(inputs.some((file) => file.endsWith("connect-web/dist/esm/grpc-web-transport.js")));
  assert.ok(!inputs.some((file) => /connect-node|grpc-js/.test(file)), inputs.join("\n"));
  return made.outputFiles[0]?.text ?? "";
}

async function listenSomewhere(server: Server): Promise<number> {
  for (const port of PORTS) {
    const isFree = await listen(server, port).then(
      () => true,
      () => false,
    );
    if (isFree) return port;
  }
  throw new Error(`none of the ports ${PORTS} is free`);
}

test("a person signs up, logs in, refreshes and logs out in a browser", async () => {
  const script = await bundled();
  const page = '<!doctype html><link rel="icon" href="data:,"><script type="module" src="/page.js"></script>';
  let deliver = (_: string) => {};
  const result = new Promise<string>((resolve) => {
    deliver = resolve;
  });
  const site = createServer(async (request, response) => {
    if (request.url === "/result") deliver(await text(request));
    response.setHeader("content-type", request.url === "/page.js" ? "text/javascript" : "text/html");
    response.end(request.url === "/page.js" ? script : page);
  });
  after(() => site.closeAllConnections());
  after(() => site.close());
  const port = await listenSomewhere(site);

  const profile = await mkdtemp(join(tmpdir(), "chromium-"));
  const quiet = ["--no-first-run", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"];
  const own = ["--disable-component-update", "--disable-sync", "--no-proxy-server", "--no-sandbox", "--headless=new"];
  const url = `http://127.0.0.1:${port}/?postern=${encodeURIComponent(env("POSTERN_ISSUER"))}`;
  const options = { stdio: "ignore", env: { ...process.env, HOME: profile }, detached: true } as const;
  const chromium = spawn("chromium", [...quiet, ...own, `--user-data-dir=${profile}`, url], options);
  const failed = once(chromium, "exit").then(([code]) => `chromium ended: ${code}`);
  const late = new Promise<string>((resolve) => setTimeout(resolve, 30_000, "chromium says nothing").unref());
  try {
    const found = await Promise.race([result, failed, late]);
    assert.deepEqual(JSON.parse(found.startsWith("{") ? found : JSON.stringify({ error: found })), {
      isExpected: true,
      rotated: true,
      taken: "EMAIL_TAKEN",
      missing: "TOKEN_MISSING",
      lost: "code 2",
      keptWhileLost: true,
      afterLogout: "REFRESH_TOKEN_INVALID",
      isStoreEmpty: true,
    });
  } finally {
    // The browser and the processes that it has started.
    if (chromium.pid !== undefined && chromium.exitCode === null) {
      process.kill(-chromium.pid, "SIGKILL");
      await failed;
    }
    await rm(profile, { recursive: true, force: true, maxRetries: 5, retryDelay: 100 });
  }
  console.log(`the page has ${Math.round(script.length / 1_024)} KiB, with this library and all stubs that it uses`);
});
