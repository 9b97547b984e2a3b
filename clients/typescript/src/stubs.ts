// The generated services and messages of `postern.auth.v1`, for calls that this library does not make itself.
export * from "./gen/postern/auth/v1/access_pb.js";
export * from "./gen/postern/auth/v1/account_service_pb.js";
export * from "./gen/postern/auth/v1/admin_service_pb.js";
export * from "./gen/postern/auth/v1/audit_event_pb.js";
export * from "./gen/postern/auth/v1/auth_service_pb.js";
export * from "./gen/postern/auth/v1/errors_pb.js";
export * from "./gen/postern/auth/v1/service_account_pb.js";
export * from "./gen/postern/auth/v1/session_pb.js";
export * from "./gen/postern/auth/v1/token_pair_pb.js";
export * from "./gen/postern/auth/v1/token_service_pb.js";
export * from "./gen/postern/auth/v1/user_pb.js";
