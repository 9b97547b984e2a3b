// The function that docs/errors.md shows for programs without this library; tests/libraries/test_snippets.py compares them.
import assert from "node:assert/strict";
import { test } from "node:test";
import { Code, ConnectError } from "@connectrpc/connect";
import { ErrorInfoSchema } from "../src/gen/google/rpc/error_details_pb.js";

function reasonOf(error: unknown): string {
  const infos = ConnectError.from(error).findDetails(ErrorInfoSchema);
  return infos.find((info) => info.domain === "postern.auth.v1")?.reason ?? "";
}

test("the reason of an error without this library", () => {
  for (const [domain, wanted] of [
    ["postern.auth.v1", "FROM_THE_FUTURE"],
    ["another", ""],
  ] as const) {
    const detail = { desc: ErrorInfoSchema, value: { reason: "FROM_THE_FUTURE", domain } };
    assert.equal(reasonOf(new ConnectError("later", Code.Aborted, undefined, [detail])), wanted);
  }
  assert.equal(reasonOf(new Error("another one")), "");
});
