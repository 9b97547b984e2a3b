// The decision about a call: every kind of caller against every demand, and what counts as a token.
import assert from "node:assert/strict";
import { test } from "node:test";
import { authorize, callerOf, type Demand, Verifier } from "@postern/client";
import { AUDIENCE, ISSUER, newKey, refusal, serviceClaims } from "./support.js";

const key = await newKey();
const verifier = new Verifier({ issuer: ISSUER, audience: AUDIENCE, keys: { keys: [key.jwk] }, revocations: "none" });
const tokens = {
  person: await key.sign(),
  verified: await key.sign({ email_verified: true }),
  admin: await key.sign({ roles: ["admin", "user"] }),
  service: await key.sign(serviceClaims()),
  expired: await key.sign({ iat: 1, exp: 2 }),
};
const decide = (values: string[], demand?: Demand) => refusal(authorize(verifier, values, demand));

test("every caller against every demand", async () => {
  const verdicts: [Demand | undefined, Record<keyof typeof tokens | "nobody", string>][] = [
    [
      { access: "public" },
      {
        nobody: "ACCEPTED",
        person: "ACCEPTED",
        verified: "ACCEPTED",
        admin: "ACCEPTED",
        service: "ACCEPTED",
        expired: "ACCEPTED",
      },
    ],
    [
      { access: "authenticated" },
      {
        nobody: "TOKEN_MISSING",
        person: "ACCEPTED",
        verified: "ACCEPTED",
        admin: "ACCEPTED",
        service: "ACCEPTED",
        expired: "TOKEN_EXPIRED",
      },
    ],
    [
      { access: "user" },
      {
        nobody: "TOKEN_MISSING",
        person: "ACCEPTED",
        verified: "ACCEPTED",
        admin: "ACCEPTED",
        service: "USER_REQUIRED",
        expired: "TOKEN_EXPIRED",
      },
    ],
    [
      { access: "service" },
      {
        nobody: "TOKEN_MISSING",
        person: "SERVICE_REQUIRED",
        verified: "SERVICE_REQUIRED",
        admin: "SERVICE_REQUIRED",
        service: "ACCEPTED",
        expired: "TOKEN_EXPIRED",
      },
    ],
    [
      { access: "user", role: "admin", emailVerified: true },
      {
        nobody: "TOKEN_MISSING",
        person: "ROLE_REQUIRED",
        verified: "ROLE_REQUIRED",
        admin: "EMAIL_NOT_VERIFIED",
        service: "USER_REQUIRED",
        expired: "TOKEN_EXPIRED",
      },
    ],
    [
      { access: "authenticated", emailVerified: true },
      {
        nobody: "TOKEN_MISSING",
        person: "EMAIL_NOT_VERIFIED",
        verified: "ACCEPTED",
        admin: "EMAIL_NOT_VERIFIED",
        service: "EMAIL_NOT_VERIFIED",
        expired: "TOKEN_EXPIRED",
      },
    ],
    [
      undefined,
      {
        nobody: "ROLE_REQUIRED",
        person: "ROLE_REQUIRED",
        verified: "ROLE_REQUIRED",
        admin: "ROLE_REQUIRED",
        service: "ROLE_REQUIRED",
        expired: "ROLE_REQUIRED",
      },
    ],
  ];
  for (const [demand, expected] of verdicts) {
    const found: Record<string, string> = { nobody: await decide([], demand) };
    for (const [who, token] of Object.entries(tokens)) found[who] = await decide([`Bearer ${token}`], demand);
    assert.deepEqual(found, expected, JSON.stringify(demand));
  }
});

test("a demand that is misspelt is refused for everybody", async () => {
  const misspelt = { access: "users" } as unknown as Demand;
  assert.equal(await decide([`Bearer ${tokens.admin}`], misspelt), "ROLE_REQUIRED");
});

test("exactly one value of the scheme Bearer is a token", async () => {
  const token = tokens.person;
  const cases: [string[], string][] = [
    [[`bEARER ${token}`], "ACCEPTED"],
    [[`Bearer   ${token}`], "ACCEPTED"],
    [["Basic YTpi"], "TOKEN_MISSING"],
    [[token], "TOKEN_MISSING"],
    [[""], "TOKEN_MISSING"],
    [["Bearer"], "TOKEN_INVALID"],
    [[`Bearer ${token} `], "TOKEN_INVALID"],
    [[`Bearer ${token}, Bearer ${token}`], "TOKEN_INVALID"],
    [[`Bearer ${token}`, `Bearer ${token}`], "TOKEN_INVALID"],
    [["Basic YTpi", `Bearer ${token}`], "TOKEN_INVALID"],
  ];
  for (const [values, expected] of cases) {
    assert.equal(await decide(values, { access: "authenticated" }), expected, values.join(" | "));
  }
});

test("a call without a guard has no caller", () => {
  for (const call of [{}, { metadata: {}, raw: undefined, values: "x" }])
    assert.throws(() => callerOf(call), /no caller/);
});
