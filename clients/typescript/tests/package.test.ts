// What is published, and what the README shows.
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";

const ROOT = join(import.meta.dirname, "../..");

test("the package contains what it exports, with types, and nothing of the tests", () => {
  const { exports } = JSON.parse(readFileSync(join(ROOT, "package.json"), "utf8")) as {
    exports: Record<string, string>;
  };
  const packed = execFileSync("npm", ["pack", "--dry-run", "--ignore-scripts", "--json"], {
    cwd: ROOT,
    encoding: "utf8",
  });
  const [content] = Object.values(JSON.parse(packed)) as { files: { path: string }[] }[];
  const files = new Set(content?.files.map(({ path }) => path));
  for (const target of Object.values(exports)) {
    assert.ok(files.has(target.slice(2)), target);
    assert.ok(files.has(target.slice(2).replace(/js$/, "d.ts")), target);
  }
  assert.ok(files.has("dist/gen/postern/auth/v1/auth_service_pb.js"));
  assert.ok(files.has("README.md"));
  assert.deepEqual(
    [...files].filter((file) => !/^(dist\/|README\.md$|package\.json$)/.test(file)),
    [],
  );
});

test("every snippet of the README is part of a program that the tests run", () => {
  const snippets = [...readFileSync(join(ROOT, "README.md"), "utf8").matchAll(/^```ts\n(.*?)^```/gms)].map(
    ([, code]) => code,
  );
  assert.ok(snippets.length > 5);
  const files = [...readdirSync(join(ROOT, "tests"), { recursive: true, encoding: "utf8" })].filter((file) =>
    file.endsWith(".ts"),
  );
  const sources = files.map((file) => readFileSync(join(ROOT, "tests", file), "utf8").replace(/^ +/gm, ""));
  for (const snippet of snippets) {
    const code = snippet?.replace(/^ +/gm, "") ?? "";
    assert.ok(
      sources.some((source) => source.includes(code)),
      `no test has this:\n${snippet}`,
    );
  }
});
