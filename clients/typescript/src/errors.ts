// Errors: what a failed call says for programs, and the refusals of this library, in one class that knows how each
// transport writes them.
import { create, fromBinary, toBinary } from "@bufbuild/protobuf";
import { anyPack, durationMs } from "@bufbuild/protobuf/wkt";
import { Code, ConnectError } from "@connectrpc/connect";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "./gen/google/rpc/error_details_pb.js";
import { StatusSchema } from "./gen/google/rpc/status_pb.js";
import { ErrorReason, ErrorReasonSchema } from "./gen/postern/auth/v1/errors_pb.js";

/** The `domain` of Postern's errors, and of the refusals of this library. */
export const ERROR_DOMAIN = "postern.auth.v1";

type KnownReason = Exclude<keyof typeof ErrorReason, "UNSPECIFIED">;

/** Why a call failed: one of docs/errors.md, or one that a newer Postern has. `""` if the error names none. */
export type Reason = KnownReason | (string & {});

/** The reasons that this version knows, as constants: `error.reason === Reason.TOKEN_EXPIRED`. */
export const Reason = Object.fromEntries(
  ErrorReasonSchema.values
    .filter(({ number }) => number !== 0)
    .map(({ number }) => [ErrorReason[number], ErrorReason[number]]),
) as { readonly [Name in KnownReason]: Name };

/** What this library says when it refuses: in the words, and with the codes, of Postern. */
const REFUSALS = {
  TOKEN_MISSING: [Code.Unauthenticated, "this call needs an access token"],
  TOKEN_INVALID: [Code.Unauthenticated, "the access token is invalid"],
  TOKEN_EXPIRED: [Code.Unauthenticated, "the access token has expired"],
  SESSION_REVOKED: [Code.Unauthenticated, "the session has ended"],
  REFRESH_TOKEN_INVALID: [Code.Unauthenticated, "the refresh token is invalid"],
  USER_REQUIRED: [Code.PermissionDenied, "this call is for people, and the token is that of a service"],
  SERVICE_REQUIRED: [Code.PermissionDenied, "this call is for services, and the token is that of a person"],
  ROLE_REQUIRED: [Code.PermissionDenied, "the caller lacks the role that this call needs"],
  EMAIL_NOT_VERIFIED: [Code.PermissionDenied, "the email address is not verified"],
  STORE_UNAVAILABLE: [Code.Unavailable, "the token cannot be judged now"],
} as const;

/** A field that Postern refused, and why. */
export interface FieldViolation {
  readonly field: string;
  /** For programs, such as `TOO_SHORT`: docs/errors.md lists them. */
  readonly reason: string;
  /** For people. */
  readonly description: string;
}

/** A failed call, or a caller that was refused. Decide by `reason`, and by `code` where it is unknown. */
export class PosternError extends Error {
  override readonly name = "PosternError";
  /** The refused fields; empty unless `reason` is `INVALID_FIELD`. */
  readonly violations: readonly FieldViolation[];
  /** After how many milliseconds the call may be repeated, if Postern says so. */
  readonly retryDelayMs: number | undefined;

  constructor(
    /** The gRPC code. Connect and grpc-js have the same numbers. */
    readonly code: Code,
    readonly reason: Reason,
    message: string,
    more: { violations?: readonly FieldViolation[]; retryDelayMs?: number | undefined; cause?: unknown } = {},
  ) {
    super(message, { cause: more.cause });
    this.violations = more.violations ?? [];
    this.retryDelayMs = more.retryDelayMs;
  }

  /** A refusal by this library, as Postern would write it. */
  static refusal(reason: keyof typeof REFUSALS, message: string = REFUSALS[reason][1], cause?: unknown): PosternError {
    return new PosternError(REFUSALS[reason][0], reason, message, { cause });
  }

  /** Reads whatever a call threw: a `ConnectError`, a `ServiceError` of grpc-js, or anything else (`Code.Unknown`). */
  static from(error: unknown): PosternError {
    if (error instanceof PosternError) return error;
    const failure = isServiceError(error) ? fromGrpcJs(error) : ConnectError.from(error);
    const info = failure.findDetails(ErrorInfoSchema).find(({ domain }) => domain === ERROR_DOMAIN);
    const delay = failure.findDetails(RetryInfoSchema)[0]?.retryDelay;
    return new PosternError(failure.code, info?.reason ?? "", failure.rawMessage, {
      violations: failure
        .findDetails(BadRequestSchema)
        .flatMap((found) =>
          found.fieldViolations.map(({ field, reason, description }) => ({ field, reason, description })),
        ),
      retryDelayMs: delay && durationMs(delay),
      cause: error,
    });
  }

  /** The error as a handler or an interceptor of Connect throws it. */
  toConnectError(): ConnectError {
    const info = { desc: ErrorInfoSchema, value: { reason: this.reason, domain: ERROR_DOMAIN } };
    return new ConnectError(this.message, this.code, undefined, this.reason ? [info] : [], this);
  }

  /** The error as a `google.rpc.Status` in binary, for the trailer `grpc-status-details-bin`. */
  toStatusDetails(): Uint8Array {
    const info = create(ErrorInfoSchema, { reason: this.reason, domain: ERROR_DOMAIN });
    const details = this.reason ? [anyPack(ErrorInfoSchema, info)] : [];
    return toBinary(StatusSchema, create(StatusSchema, { code: this.code, message: this.message, details }));
  }
}

/** What grpc-js throws, as far as it is read here. */
interface ServiceError extends Error {
  code: Code;
  details: string;
  metadata: { get(key: string): unknown[] };
}

function isServiceError(error: unknown): error is ServiceError {
  return error instanceof Error && "details" in error && typeof error.details === "string" && "metadata" in error;
}

function fromGrpcJs(error: ServiceError): ConnectError {
  const found = new ConnectError(error.details, error.code);
  const [encoded] = error.metadata.get("grpc-status-details-bin");
  try {
    const { details } = fromBinary(StatusSchema, encoded instanceof Uint8Array ? encoded : new Uint8Array());
    found.details = details.map(({ typeUrl, value }) => ({ type: typeUrl.slice(typeUrl.lastIndexOf("/") + 1), value }));
  } catch {
    // Details that cannot be read are no reason to hide the code.
  }
  return found;
}
