//! The response of a failed HTTP request: its gRPC status in the JSON form of AIP-193. The HTTP codes follow the
//! mapping of google.rpc.Code, which Envoy uses too.

use std::sync::LazyLock;

use axum::{
    body::Body,
    response::{IntoResponse, Response},
};
use http::{HeaderValue, StatusCode, header};
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor};
use serde_json::{Value, json};
use tonic::{Code, Status};
use tonic_types::{FieldViolation, StatusExt};

use crate::{
    error::Error,
    grpc::{self, code_name},
};

use super::json;

/// The descriptors of `google.rpc.Status` and of the types of its details.
static STATUS_PROTO: LazyLock<Option<MessageDescriptor>> = LazyLock::new(|| {
    let pool = DescriptorPool::decode(tonic_types::pb::FILE_DESCRIPTOR_SET).ok()?;
    pool.get_message_by_name("google.rpc.Status")
});

/// A failed request: its HTTP code and its gRPC status.
#[derive(Debug)]
pub struct ErrorResponse {
    http: StatusCode,
    status: Box<Status>,
}

/// In the extensions of the response of a failed request: its status, for whoever answers in another form.
#[derive(Debug, Clone)]
pub struct Refused(pub Status);

impl From<Status> for ErrorResponse {
    fn from(status: Status) -> Self {
        Self { http: http_status(status.code()), status: Box::new(status) }
    }
}

impl From<Error> for ErrorResponse {
    fn from(error: Error) -> Self {
        Status::from(error).into()
    }
}

impl ErrorResponse {
    /// No such route.
    pub fn not_found() -> Self {
        Status::not_found("there is no such route").into()
    }

    /// The route does not have this method. The router adds `Allow`.
    pub fn method_not_allowed() -> Self {
        let status = Status::unimplemented("this route does not have this method");
        Self { http: StatusCode::METHOD_NOT_ALLOWED, ..status.into() }
    }

    /// The body did not arrive in time.
    pub fn request_timeout() -> Self {
        let status = Status::deadline_exceeded("the body did not arrive in time");
        Self { http: StatusCode::REQUEST_TIMEOUT, ..status.into() }
    }

    /// The body is larger than a request may be.
    pub fn too_large(limit: usize) -> Self {
        let status = Status::invalid_argument(format!("the body is larger than {limit} bytes"));
        Self { http: StatusCode::PAYLOAD_TOO_LARGE, ..status.into() }
    }

    /// The headers are larger than those of a request may be.
    pub fn oversized_head() -> Self {
        Self { http: StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, ..grpc::oversized_head().into() }
    }

    /// Names the refused fields as JSON does: `refreshToken`, where the message has `refresh_token`.
    #[must_use]
    pub fn in_json_names(self, input: &MessageDescriptor) -> Self {
        let mut details = self.status.get_error_details();
        let Some(violations) = details.bad_request().map(|bad| bad.field_violations.clone()) else {
            return self;
        };
        let mut message = self.status.message().to_owned();
        let renamed = violations.into_iter().map(|violation| {
            let Some(field) = input.get_field_by_name(&violation.field) else {
                return violation;
            };
            let described = |name: &str| format!("{name} {}", violation.description);
            message = message.replacen(&described(&violation.field), &described(field.json_name()), 1);
            FieldViolation { field: field.json_name().to_owned(), ..violation }
        });
        let renamed: Vec<_> = renamed.collect();
        details.set_bad_request(renamed);
        Self { status: Box::new(Status::with_error_details(self.status.code(), message, details)), ..self }
    }

    /// The body has another content type.
    pub fn unsupported_media_type() -> Self {
        let status = Status::invalid_argument("the body must have the content type application/json");
        Self { http: StatusCode::UNSUPPORTED_MEDIA_TYPE, ..status.into() }
    }
}

impl IntoResponse for ErrorResponse {
    fn into_response(self) -> Response {
        let Self { http, status } = self;
        let body = json!({"error": {
            "code": http.as_u16(),
            "status": code_name(status.code()),
            "message": status.message(),
            "details": details(&status),
        }});
        let mut response = Response::new(Body::from(body.to_string()));
        *response.status_mut() = http;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if http == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(seconds) = retry_after(&status) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response.extensions_mut().insert(Refused(*status));
        response
    }
}

/// The retry delay of a status in whole seconds (RFC 9110 §10.2.3), at least 1. `None` if the status has none.
pub fn retry_after(status: &Status) -> Option<u64> {
    let delay = status.get_details_retry_info()?.retry_delay?;
    Some((delay.as_secs() + u64::from(delay.subsec_nanos() > 0)).max(1))
}

/// The details as proto3 JSON, each with its `@type`. Empty if they cannot be read.
fn details(status: &Status) -> Value {
    let read = || {
        let message = DynamicMessage::decode(STATUS_PROTO.clone()?, status.details()).ok()?;
        json::of_message(&message).ok()?.get("details").cloned()
    };
    read().unwrap_or_else(|| Value::Array(Vec::new()))
}

/// The HTTP code of a gRPC code, as `google.rpc.Code` maps it.
pub fn http_status(code: Code) -> StatusCode {
    match code {
        Code::Ok => StatusCode::OK,
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange => StatusCode::BAD_REQUEST,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::AlreadyExists | Code::Aborted => StatusCode::CONFLICT,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Cancelled => StatusCode::from_u16(499).unwrap_or(StatusCode::REQUEST_TIMEOUT),
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Code::Unknown | Code::Internal | Code::DataLoss => StatusCode::INTERNAL_SERVER_ERROR,
    }
}
