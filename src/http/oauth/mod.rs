//! The standard endpoints of OAuth 2.0: token (RFC 6749), introspection (RFC 7662), revocation (RFC 7009), and the metadata
//! that leads to them (RFC 8414). Each is an adapter over RPCs, which pass the same layers as those of gRPC clients, so there
//! is no second policy: who may do what, limits and metrics are those of the RPCs.

mod answer;
mod client;
mod error;
mod metadata;
mod parameters;

use std::sync::Arc;

use axum::{
    Router,
    body::Bytes,
    extract::{Request, State},
    response::Response,
    routing::post,
};
use http::{Extensions, HeaderMap, HeaderName, header};
use prost::Message;
use serde_json::json;
use time::OffsetDateTime;
use tonic::Status;

use crate::{
    domain::{env::Env, service::Service},
    error::Error,
    grpc::{self, ServicesOnly},
    listen::ClientAddr,
    proto::{
        IntrospectTokenRequest, IntrospectTokenResponse, IssueServiceTokenRequest, IssueServiceTokenResponse,
        RefreshRequest, RefreshResponse, RevokeTokenRequest, RevokeTokenResponse, SubjectType,
    },
    tls::ServiceCertificate,
};

use super::call;

use self::{
    answer::{answer, done},
    client::Presented,
    error::OAuthError,
    parameters::Parameters,
};
pub use self::{
    error::normalize,
    metadata::{METADATA_PATH, members, metadata, path_for},
};

const ISSUE: &str = "/postern.auth.v1.TokenService/IssueServiceToken";
const INTROSPECT: &str = "/postern.auth.v1.TokenService/IntrospectToken";
const REFRESH: &str = "/postern.auth.v1.AuthService/Refresh";
const REVOKE_TOKEN: &str = "/postern.auth.v1.TokenService/RevokeToken";

/// The headers that are passed on with every call: its id, its trace and its program.
const PASSED_ON: [HeaderName; 3] = [grpc::REQUEST_ID, HeaderName::from_static("traceparent"), header::USER_AGENT];

/// A router that serves the endpoints through the gRPC layers.
pub fn router(grpc: &Router, service: &Service, env: Env) -> Router {
    let endpoints = Endpoints {
        grpc: grpc.clone(),
        issuer: service.issuer().to_owned(),
        audience: service.audience().to_owned(),
        env,
    };
    Router::new()
        .route(metadata::TOKEN, post(token))
        .route(metadata::INTROSPECT, post(introspect))
        .route(metadata::REVOKE, post(revoke))
        .with_state(Arc::new(endpoints))
}

/// What the endpoints need beside a request.
#[derive(Debug)]
struct Endpoints {
    grpc: Router,
    issuer: String,
    audience: String,
    env: Env,
}

/// A request that was read: its parameters, who sent it, and what goes along with every call for it.
struct Asked {
    parameters: Parameters,
    presented: Presented,
    metadata: HeaderMap,
    extensions: Extensions,
}

impl Asked {
    async fn read(request: Request) -> Result<Self, OAuthError> {
        let (parts, body) = request.into_parts();
        let parameters = Parameters::read(&parts.headers, &parts.uri, body).await?;
        let presented = Presented::read(&parts.headers, &parameters)?;
        let passed_on = |name: HeaderName| parts.headers.get(&name).cloned().map(|value| (name, value));
        let mut extensions = Extensions::new();
        if let Some(peer) = parts.extensions.get::<ClientAddr>() {
            extensions.insert(*peer);
        }
        if let Some(certificate) = parts.extensions.get::<ServiceCertificate>() {
            extensions.insert(certificate.clone());
        }
        let metadata = PASSED_ON.into_iter().filter_map(passed_on).collect();
        Ok(Self { parameters, presented, metadata, extensions })
    }

    /// The same extensions, with the credentials of the client if it has sent some. An access token is not one of its ways
    /// to authenticate here.
    fn with_client(&self) -> Result<Extensions, OAuthError> {
        let mut extensions = self.extensions.clone();
        match &self.presented {
            Presented::Nothing => {}
            Presented::Credentials(credentials) => drop(extensions.insert(credentials.clone())),
            Presented::Bearer(_) => return Err(OAuthError::invalid_client()),
        }
        Ok(extensions)
    }
}

impl Endpoints {
    async fn call<Answer: Message + Default>(
        &self,
        rpc: &str,
        message: &impl Message,
        metadata: HeaderMap,
        extensions: Extensions,
    ) -> Result<Answer, Status> {
        let bytes: Bytes = call::call_with(self.grpc.clone(), rpc, message, metadata, extensions).await?;
        Answer::decode(bytes).map_err(|error| Error::internal(error).into())
    }

    /// The seconds until a time (RFC 6749 section 5.1).
    fn seconds_until(&self, time: Option<prost_types::Timestamp>) -> i64 {
        let now: OffsetDateTime = self.env.now();
        (time.map_or(0, |time| time.seconds) - now.unix_timestamp()).max(0)
    }
}

/// The token endpoint.
async fn token(State(endpoints): State<Arc<Endpoints>>, request: Request) -> Result<Response, OAuthError> {
    let asked = Asked::read(request).await?;
    let grant_type = asked.parameters.required("grant_type")?;
    if !matches!(grant_type, "client_credentials" | "refresh_token") {
        return Err(OAuthError::unsupported_grant_type());
    }
    // An answer has to say which scope it grants if that is another one than was asked for, and has no way to say "none"
    // (section 3.3).
    if asked.parameters.get("scope").is_some() {
        return Err(OAuthError::invalid_scope());
    }
    if grant_type == "client_credentials" { issue(&endpoints, asked).await } else { refresh(&endpoints, asked).await }
}

/// Section 4.4: the credentials of a service for an access token.
async fn issue(endpoints: &Endpoints, asked: Asked) -> Result<Response, OAuthError> {
    let Presented::Credentials(credentials) = asked.presented else {
        return Err(OAuthError::invalid_client());
    };
    let message =
        IssueServiceTokenRequest { client_id: credentials.id, client_secret: credentials.secret.expose().to_owned() };
    let issued: IssueServiceTokenResponse = endpoints.call(ISSUE, &message, asked.metadata, asked.extensions).await?;
    Ok(answer(&json!({
        "access_token": issued.access_token,
        "token_type": issued.token_type,
        "expires_in": endpoints.seconds_until(issued.access_token_expire_time),
    })))
}

/// Section 6: a refresh token for the next pair. It is the credential, and belongs to no client that has another one.
async fn refresh(endpoints: &Endpoints, asked: Asked) -> Result<Response, OAuthError> {
    let message = RefreshRequest { refresh_token: asked.parameters.required("refresh_token")?.to_owned() };
    let extensions = asked.with_client()?;
    let refreshed: RefreshResponse = endpoints.call(REFRESH, &message, asked.metadata, extensions).await?;
    let tokens = refreshed.tokens.unwrap_or_default();
    Ok(answer(&json!({
        "access_token": tokens.access_token,
        "token_type": tokens.token_type,
        "expires_in": endpoints.seconds_until(tokens.access_token_expire_time),
        "refresh_token": tokens.refresh_token,
    })))
}

/// The introspection endpoint, for services.
async fn introspect(State(endpoints): State<Arc<Endpoints>>, request: Request) -> Result<Response, OAuthError> {
    let Asked { parameters, presented, mut metadata, mut extensions } = Asked::read(request).await?;
    extensions.insert(ServicesOnly);
    match presented {
        // The client certificate of a service will do (RFC 8705 section 2).
        Presented::Nothing if extensions.get::<ServiceCertificate>().is_some() => {}
        Presented::Nothing => return Err(OAuthError::unauthenticated()),
        Presented::Credentials(credentials) => drop(extensions.insert(credentials)),
        Presented::Bearer(value) => drop(metadata.insert(header::AUTHORIZATION, value)),
    }
    let message = IntrospectTokenRequest { token: parameters.required("token")?.to_owned() };
    let found: IntrospectTokenResponse = endpoints.call(INTROSPECT, &message, metadata, extensions).await?;
    if !found.active {
        return Ok(answer(&json!({"active": false})));
    }
    let seconds = |time: Option<prost_types::Timestamp>| time.map(|time| time.seconds);
    let is_person = found.subject_type() == SubjectType::User;
    let mut members = json!({
        "active": true,
        "iss": endpoints.issuer,
        "aud": endpoints.audience,
        "sub": found.subject,
        "subject_type": if is_person { "user" } else { "service" },
        "client_id": found.client_id,
        "username": found.username,
        "token_type": "Bearer",
        "iat": seconds(found.issue_time),
        "exp": seconds(found.expire_time),
        "sid": found.session_id,
        "roles": found.roles,
    });
    if is_person && let Some(members) = members.as_object_mut() {
        members.insert("email".to_owned(), found.email.into());
        members.insert("email_verified".to_owned(), found.email_verified.into());
    }
    Ok(answer(&members))
}

/// The revocation endpoint.
///
/// The token is the credential. A client that authenticates nevertheless must be right. A token that is not valid, for
/// whatever reason, is answered like one that was revoked just now (RFC 7009 section 2.2).
async fn revoke(State(endpoints): State<Arc<Endpoints>>, request: Request) -> Result<Response, OAuthError> {
    let asked = Asked::read(request).await?;
    let message = RevokeTokenRequest { token: asked.parameters.required("token")?.to_owned() };
    let extensions = asked.with_client()?;
    let RevokeTokenResponse {} = endpoints.call(REVOKE_TOKEN, &message, asked.metadata, extensions).await?;
    Ok(done())
}
