// Errors: what programs read from a failed call, by both transports, and what they get where there is nothing to read.
import assert from "node:assert/strict";
import { test } from "node:test";
import { create, toBinary } from "@bufbuild/protobuf";
import { anyPack } from "@bufbuild/protobuf/wkt";
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import { Metadata, type ServiceError } from "@grpc/grpc-js";
import { PosternError, posternTransport, Reason } from "@postern/client";
import { AuthService } from "@postern/client/stubs";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "../src/gen/google/rpc/error_details_pb.js";
import { StatusSchema } from "../src/gen/google/rpc/status_pb.js";
import { env } from "./support.js";

const info = create(ErrorInfoSchema, { domain: "postern.auth.v1", reason: "A_REASON_OF_TOMORROW" });
const retry = create(RetryInfoSchema, { retryDelay: { seconds: 2n, nanos: 500_000_000 } });
const violation = { field: "email", reason: "MALFORMED", description: "is no address" };
const fields = create(BadRequestSchema, { fieldViolations: [violation] });

function ofGrpcJs(code: number, details: string, encoded?: Uint8Array): ServiceError {
  const metadata = new Metadata();
  if (encoded) metadata.set("grpc-status-details-bin", Buffer.from(encoded));
  return Object.assign(new Error(`${code}: ${details}`), { code, details, metadata });
}

test("the details of a call are read, by both transports, also with a reason that nobody knows yet", () => {
  const details = [anyPack(ErrorInfoSchema, info), anyPack(RetryInfoSchema, retry), anyPack(BadRequestSchema, fields)];
  const encoded = toBinary(StatusSchema, create(StatusSchema, { code: 3, message: "no", details }));
  const byConnect = new ConnectError("no", Code.InvalidArgument, undefined, [
    { desc: ErrorInfoSchema, value: info },
    { desc: RetryInfoSchema, value: retry },
    { desc: BadRequestSchema, value: fields },
  ]);
  for (const thrown of [byConnect, ofGrpcJs(3, "no", encoded)]) {
    const error = PosternError.from(thrown);
    assert.deepEqual([error.code, error.reason, error.message], [Code.InvalidArgument, "A_REASON_OF_TOMORROW", "no"]);
    assert.deepEqual(error.violations, [violation]);
    assert.equal(error.retryDelayMs, 2_500);
    assert.equal(error.cause, thrown);
  }
});

test("an error without details has its code and no reason", () => {
  const garbage = Buffer.from("garbage");
  for (const thrown of [
    ofGrpcJs(14, "gone"),
    ofGrpcJs(14, "gone", garbage),
    new ConnectError("gone", Code.Unavailable),
  ]) {
    const { code, reason, message, violations, retryDelayMs } = PosternError.from(thrown);
    assert.deepEqual([code, reason, message, violations, retryDelayMs], [Code.Unavailable, "", "gone", [], undefined]);
  }
  assert.equal(PosternError.from("a text").code, Code.Unknown);
});

test("the reason of another service is not taken for one of Postern", () => {
  const value = create(ErrorInfoSchema, { domain: "example.com", reason: "TOKEN_EXPIRED" });
  assert.equal(PosternError.from(new ConnectError("no", 16, undefined, [{ desc: ErrorInfoSchema, value }])).reason, "");
});

test("the constants are the reasons of the contract", () => {
  assert.equal(Reason.TOKEN_EXPIRED, "TOKEN_EXPIRED");
  assert.equal(
    Object.entries(Reason).every(([name, value]) => name === value),
    true,
  );
  assert.equal("UNSPECIFIED" in Reason, false);
});

test("the real server names its reason and the refused fields", async () => {
  const client = createClient(AuthService, posternTransport(`http://${env("POSTERN_GRPC_ADDR")}`));
  await assert.rejects(client.signUp({ username: "-", email: "ada", password: "short" }), (thrown) => {
    const { code, reason, violations } = PosternError.from(thrown);
    assert.deepEqual([code, reason], [Code.InvalidArgument, Reason.INVALID_FIELD]);
    assert.deepEqual(
      violations.map(({ field }) => field),
      ["username", "email", "password"],
    );
    return true;
  });
});
