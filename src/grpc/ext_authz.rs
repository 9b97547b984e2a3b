//! `envoy.service.auth.v3.Authorization`: Envoy asks about each request that it has received. Every outcome is an answer:
//! Envoy may be told to let a request pass when an RPC fails.

use std::{borrow::Cow, sync::Arc};

use axum::{
    body::{Body, Bytes},
    extract::Request as HttpRequest,
    response::Response as HttpResponse,
};
use http::{HeaderMap, HeaderName, HeaderValue, header::CONTENT_TYPE};
use http_body_util::{BodyExt as _, Full};
use prost::Message as _;
use prost_types::{ListValue, Struct, Value, value::Kind};
use tonic::{Code, Request, Response, Status};

use crate::{
    domain::{
        demands::Demands,
        role::{Caller, Role},
        service::{
            Service,
            checks::{CHECKS, UNAVAILABLE},
        },
        token::VerifiedToken,
    },
    proto::external::envoy::{
        config::core::v3::{HeaderValue as EnvoyHeader, HeaderValueOption, header_value_option::HeaderAppendAction},
        service::auth::v3::{
            AttributeContext, CheckRequest, CheckResponse, DeniedHttpResponse, OkHttpResponse,
            attribute_context::HttpRequest as AskedRequest, authorization_server::Authorization,
            check_response::HttpResponse as Outcome,
        },
        r#type::v3::{HttpStatus, StatusCode},
    },
};

use super::{
    decision::{Allowed, Decision, Denied, decide, subject_type},
    next::Next,
};

/// The path of the RPC.
pub const CHECK: &str = "/envoy.service.auth.v3.Authorization/Check";

const AUTHORIZATION: &str = "authorization";

/// The RPC of `Authorization`.
#[derive(Debug, Clone)]
pub struct CheckRpc {
    service: Arc<Service>,
}

impl CheckRpc {
    pub fn new(service: Arc<Service>) -> Self {
        Self { service }
    }
}

#[tonic::async_trait]
impl Authorization for CheckRpc {
    async fn check(&self, request: Request<CheckRequest>) -> Result<Response<CheckResponse>, Status> {
        let AttributeContext { request, context_extensions } = request.into_inner().attributes.unwrap_or_default();
        let asked = request.and_then(|request| request.http).unwrap_or_default();
        let demands = Demands::parse(context_extensions.iter().map(|(name, value)| (name.as_str(), value.as_str())));
        let decision = decide(&self.service, authorization(&asked), demands);
        Ok(Response::new(decision.into()))
    }
}

/// The values of `authorization`, in whichever form Envoy was told to send headers.
fn authorization(asked: &AskedRequest) -> impl Iterator<Item = &[u8]> {
    let joined = asked.headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case(AUTHORIZATION));
    let raw = asked.header_map.iter().flat_map(|map| &map.headers);
    let raw = raw.filter(|header| header.key.eq_ignore_ascii_case(AUTHORIZATION));
    joined.map(|(_, value)| value.as_bytes()).chain(raw.map(raw_value))
}

fn raw_value(header: &EnvoyHeader) -> &[u8] {
    if header.raw_value.is_empty() { header.value.as_bytes() } else { &header.raw_value }
}

impl From<Decision> for CheckResponse {
    fn from(decision: Decision) -> Self {
        match decision {
            Decision::Allowed(allowed) => allowed.into(),
            Decision::Denied(denied) => denied.into(),
        }
    }
}

impl From<Allowed> for CheckResponse {
    fn from(Allowed { identity, removed, caller }: Allowed) -> Self {
        let headers = identity.into_iter().map(|(name, value)| replacing(name, value)).collect();
        let headers_to_remove = removed.into_iter().map(str::to_owned).collect();
        Self {
            status: Some(status(Code::Ok, "")),
            http_response: Some(Outcome::OkResponse(OkHttpResponse { headers, headers_to_remove })),
            dynamic_metadata: caller.map(|(token, caller)| claims(&token, &caller)),
        }
    }
}

impl From<Denied> for CheckResponse {
    fn from(Denied { http, code, message, challenge, retry_after }: Denied) -> Self {
        let retry_after = retry_after.map(|seconds| replacing("retry-after", seconds.to_owned()));
        let headers = challenge.map(|challenge| replacing("www-authenticate", challenge));
        let code_of_http = StatusCode::try_from(i32::from(http)).unwrap_or(StatusCode::Forbidden);
        Self {
            status: Some(status(code, &message)),
            http_response: Some(Outcome::DeniedResponse(DeniedHttpResponse {
                status: Some(HttpStatus { code: code_of_http.into() }),
                headers: headers.into_iter().chain(retry_after).collect(),
                body: message.into_owned(),
            })),
            dynamic_metadata: None,
        }
    }
}

fn status(code: Code, message: &str) -> tonic_types::Status {
    tonic_types::Status { code: code.into(), message: message.to_owned(), details: Vec::new() }
}

/// A header that replaces all of that name. Envoy adds to them if it is not told.
fn replacing(name: &str, value: String) -> HeaderValueOption {
    HeaderValueOption {
        header: Some(EnvoyHeader { key: name.to_owned(), value, raw_value: Vec::new() }),
        append_action: HeaderAppendAction::OverwriteIfExistsOrAdd.into(),
    }
}

/// The claims, with the roles that the caller has now, for Envoy's later filters and its access log.
fn claims(token: &VerifiedToken, caller: &Caller) -> Struct {
    let text = |text: &str| Kind::StringValue(text.to_owned());
    let number = |seconds: i64| f64::from(i32::try_from(seconds).unwrap_or(i32::MAX));
    let roles = caller.roles().iter().map(|role| Value { kind: Some(text(Role::as_str(role))) }).collect();
    let email =
        token.account.email.iter().flat_map(|email| {
            [("email", text(&email.address)), ("email_verified", Kind::BoolValue(email.is_verified))]
        });
    let claims = [
        ("sub", text(&caller.id().to_string())),
        ("subject_type", text(subject_type(caller))),
        ("client_id", text(&token.account.client_id)),
        ("sid", text(&caller.session().to_string())),
        ("username", text(&token.account.username)),
        ("roles", Kind::ListValue(ListValue { values: roles })),
        ("iat", Kind::NumberValue(number(token.issue_time.unix_timestamp()))),
        ("exp", Kind::NumberValue(number(token.expire_time.unix_timestamp()))),
    ];
    let fields = claims.into_iter().chain(email);
    Struct { fields: fields.map(|(name, kind)| (name.to_owned(), Value { kind: Some(kind) })).collect() }
}

/// Turns a `Check` that has failed into one that denies: no place, no message that can be read, too late, a panic.
pub async fn deny_failed_checks(request: HttpRequest, next: impl Next) -> HttpResponse {
    let is_check = request.uri().path() == CHECK;
    let response = next.run(request).await;
    // A call that has failed has its status in its headers.
    match Status::from_header_map(response.headers()) {
        Some(status) if is_check => {
            metrics::counter!(CHECKS, "outcome" => UNAVAILABLE).increment(1);
            let denied = match status.code() {
                Code::InvalidArgument => {
                    Denied::forbidden(Cow::Owned(format!("this request cannot be checked: {}", status.message())))
                }
                _ => Denied::undecided(),
            };
            answered(&denied.into())
        }
        _ => response,
    }
}

/// The response of a call that has succeeded.
fn answered(message: &CheckResponse) -> HttpResponse {
    let bytes = message.encode_to_vec();
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let frame = Bytes::from([&[0][..], &length.to_be_bytes(), &bytes].concat());
    let ok = HeaderMap::from_iter([(HeaderName::from_static("grpc-status"), HeaderValue::from_static("0"))]);
    let mut response = HttpResponse::new(Body::new(Full::new(frame).with_trailers(async { Some(Ok(ok)) })));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grpc::response::respond;

    async fn after(status: Status) -> CheckResponse {
        let request = HttpRequest::post(CHECK).body(Body::empty()).expect("a request");
        let response = deny_failed_checks(request, |_| async { respond(status) }).await;
        let body = response.into_body().collect().await.expect("a body");
        assert_eq!(body.trailers().and_then(|trailers| trailers.get("grpc-status")).expect("a status"), "0");
        CheckResponse::decode(body.to_bytes().slice(5..)).expect("a message")
    }

    #[tokio::test]
    async fn a_check_that_failed_is_a_denial() {
        let overloaded = Status::resource_exhausted("the service is overloaded");
        for (failed, http) in [
            (overloaded, StatusCode::ServiceUnavailable),
            (Status::deadline_exceeded("too late"), StatusCode::ServiceUnavailable),
            (Status::internal("a panic"), StatusCode::ServiceUnavailable),
            (Status::invalid_argument("the request is larger than 65536 bytes"), StatusCode::Forbidden),
        ] {
            let response = after(failed).await;
            assert_ne!(response.status.expect("a status").code, 0);
            let Some(Outcome::DeniedResponse(denied)) = response.http_response else { panic!("it passes") };
            assert_eq!(denied.status.expect("a status").code, i32::from(http));
        }
    }
}
