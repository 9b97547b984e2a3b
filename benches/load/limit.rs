//! A server of tonic alone, with the messages of Postern: what a call costs that is decided without a look at anything.

use std::net::SocketAddr;

use futures_util::stream::Empty;
use postern::proto::{
    GetMeRequest, GetMeResponse, IntrospectTokenRequest, IntrospectTokenResponse, IssueServiceTokenRequest,
    IssueServiceTokenResponse, LoginRequest, LoginResponse, LogoutRequest, LogoutResponse, RefreshRequest,
    RefreshResponse, RevokeTokenRequest, RevokeTokenResponse, SignUpRequest, SignUpResponse, User,
    WatchRevocationsRequest, WatchRevocationsResponse,
    auth_service_server::{AuthService, AuthServiceServer},
    external::envoy::{
        config::core::v3::{HeaderValue, HeaderValueOption, header_value_option::HeaderAppendAction},
        service::auth::v3::{
            CheckRequest, CheckResponse, OkHttpResponse,
            authorization_server::{Authorization, AuthorizationServer},
            check_response::HttpResponse,
        },
    },
    token_service_server::{TokenService, TokenServiceServer},
};
use prost_types::{Struct, Timestamp, Value, value::Kind};
use sqlx::{AssertSqlSafe, PgPool, Row as _};
use tonic::{Request, Response, Status, transport::Server};
use uuid::Uuid;

const ID: &str = "01932d5e-7c3a-7b1f-9d42-0123456789ab";

/// A server that shows the limit: it checks nothing, and answers at once or after one SELECT.
pub struct Limit {
    pub pool: Option<PgPool>,
    pub statement: String,
    pub session: Option<Uuid>,
    pub user: Option<Uuid>,
}

impl Limit {
    pub async fn serve(self, address: SocketAddr) {
        let server = Server::builder().add_service(TokenServiceServer::new(Constant));
        let server = server.add_service(AuthorizationServer::new(Constant)).add_service(AuthServiceServer::new(self));
        server.serve(address).await.unwrap();
    }
}

#[tonic::async_trait]
impl AuthService for Limit {
    async fn get_me(&self, _: Request<GetMeRequest>) -> Result<Response<GetMeResponse>, Status> {
        let mut user = User { username: "ada".to_owned(), email: "ada@example.com".to_owned(), ..User::default() };
        if let Some(pool) = &self.pool {
            let query = sqlx::query(AssertSqlSafe(self.statement.clone())).bind(self.session).bind(self.user);
            let row = query.fetch_one(pool).await.map_err(|error| Status::internal(error.to_string()))?;
            user.id = row.get::<Uuid, _>(0).to_string();
            user.username = row.get(1);
            user.email = row.get(2);
        }
        Ok(Response::new(GetMeResponse { user: Some(user) }))
    }

    async fn sign_up(&self, _: Request<SignUpRequest>) -> Result<Response<SignUpResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn login(&self, _: Request<LoginRequest>) -> Result<Response<LoginResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn refresh(&self, _: Request<RefreshRequest>) -> Result<Response<RefreshResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn logout(&self, _: Request<LogoutRequest>) -> Result<Response<LogoutResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

/// Answers for a token of a person, of the size that Postern's answers have.
#[derive(Clone, Copy)]
struct Constant;

#[tonic::async_trait]
impl TokenService for Constant {
    type WatchRevocationsStream = Empty<Result<WatchRevocationsResponse, Status>>;

    async fn introspect_token(
        &self,
        _: Request<IntrospectTokenRequest>,
    ) -> Result<Response<IntrospectTokenResponse>, Status> {
        Ok(Response::new(IntrospectTokenResponse {
            active: true,
            subject: ID.to_owned(),
            subject_type: 1,
            client_id: "postern".to_owned(),
            session_id: ID.to_owned(),
            username: "ada".to_owned(),
            email: "ada@example.com".to_owned(),
            email_verified: false,
            roles: vec!["user".to_owned()],
            issue_time: Some(Timestamp { seconds: 1_800_000_000, nanos: 0 }),
            expire_time: Some(Timestamp { seconds: 1_800_000_900, nanos: 0 }),
        }))
    }

    async fn issue_service_token(
        &self,
        _: Request<IssueServiceTokenRequest>,
    ) -> Result<Response<IssueServiceTokenResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn revoke_token(&self, _: Request<RevokeTokenRequest>) -> Result<Response<RevokeTokenResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn watch_revocations(
        &self,
        _: Request<WatchRevocationsRequest>,
    ) -> Result<Response<Self::WatchRevocationsStream>, Status> {
        Err(Status::unimplemented(""))
    }
}

#[tonic::async_trait]
impl Authorization for Constant {
    async fn check(&self, _: Request<CheckRequest>) -> Result<Response<CheckResponse>, Status> {
        let header = |(key, value): (&str, &str)| HeaderValueOption {
            header: Some(HeaderValue { key: key.to_owned(), value: value.to_owned(), raw_value: Vec::new() }),
            append_action: HeaderAppendAction::OverwriteIfExistsOrAdd.into(),
        };
        let headers = [
            ("x-postern-user-id", ID),
            ("x-postern-session-id", ID),
            ("x-postern-username", "ada"),
            ("x-postern-email", "ada@example.com"),
            ("x-postern-roles", "user"),
            ("x-postern-subject-type", "user"),
        ];
        let claims = ["sub", "sid", "client_id", "username", "email", "email_verified", "roles", "subject_type", "exp"];
        let text = |name: &str| (name.to_owned(), Value { kind: Some(Kind::StringValue(ID.to_owned())) });
        Ok(Response::new(CheckResponse {
            status: Some(tonic_types::Status::default()),
            http_response: Some(HttpResponse::OkResponse(OkHttpResponse {
                headers: headers.map(header).into(),
                headers_to_remove: Vec::new(),
            })),
            dynamic_metadata: Some(Struct { fields: claims.map(text).into_iter().collect() }),
        }))
    }
}
