// The generated stubs, beside those that google-proto-files makes of Google's own files in the same program.
import assert from "node:assert/strict";
import { join } from "node:path";
import { test } from "node:test";
import { getOption } from "@bufbuild/protobuf";
import * as grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";
import { PosternError } from "@postern/client";
import { Access, AuthService, access } from "@postern/client/stubs";
import { getProtoPath, load } from "google-proto-files";
import { http } from "../src/gen/google/api/annotations_pb.js";
import { env } from "./support.js";

const CONTRACT = join(import.meta.dirname, "../../../../proto");

test("the options of a method are read from the stubs", () => {
  assert.equal(getOption(AuthService.method.getMe, access), Access.AUTHENTICATED);
  assert.deepEqual(getOption(AuthService.method.getMe, http).pattern, { case: "get", value: "/v1/me" });
});

test("stubs of Google's files from another package call the server, and their errors are read", async () => {
  const details = await load("google/rpc/error_details.proto");
  assert.ok(details.lookupType("google.rpc.ErrorInfo"));
  const includeDirs = [CONTRACT, join(getProtoPath(), "..")];
  const loaded = grpc.loadPackageDefinition(loadSync("postern/auth/v1/auth_service.proto", { includeDirs }));
  const { AuthService: Client } = (
    loaded as never as { postern: { auth: { v1: Record<string, grpc.ServiceClientConstructor> } } }
  ).postern.auth.v1;
  assert.ok(Client);
  const client = new Client(env("POSTERN_GRPC_ADDR"), grpc.credentials.createInsecure());
  const error = await new Promise((resolve) => client["getMe"]?.({}, resolve));
  client.close();
  assert.equal(PosternError.from(error).reason, "TOKEN_MISSING");
});
