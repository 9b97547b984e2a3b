//! The layers, around real gRPC services and HTTP routes.

use axum::{Extension, Router, body::Body, routing::get};
use http::{Request, StatusCode};
use postern_client::{
    Caller, Demand, Demands, Guard,
    proto::{
        GetMeRequest, GetMeResponse, LoginRequest, LoginResponse, LogoutRequest, LogoutResponse, RefreshRequest,
        RefreshResponse, SignUpRequest, SignUpResponse, User,
        auth_service_client::AuthServiceClient,
        auth_service_server::{AuthService, AuthServiceServer},
    },
};
use serde_json::Value;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Code, Response, Status, transport::Server};
use tower::ServiceExt as _;

use crate::stage::{new_person, postern, service, stage, verifier};

/// A service of somebody else. The contract of Postern is at hand, so it serves as one.
struct Echo;

#[tonic::async_trait]
impl AuthService for Echo {
    async fn sign_up(&self, _: tonic::Request<SignUpRequest>) -> Result<Response<SignUpResponse>, Status> {
        Ok(Response::new(SignUpResponse::default()))
    }
    async fn login(&self, _: tonic::Request<LoginRequest>) -> Result<Response<LoginResponse>, Status> {
        Ok(Response::new(LoginResponse::default()))
    }
    async fn refresh(&self, _: tonic::Request<RefreshRequest>) -> Result<Response<RefreshResponse>, Status> {
        Ok(Response::new(RefreshResponse::default()))
    }
    async fn logout(&self, _: tonic::Request<LogoutRequest>) -> Result<Response<LogoutResponse>, Status> {
        Ok(Response::new(LogoutResponse::default()))
    }
    async fn get_me(&self, request: tonic::Request<GetMeRequest>) -> Result<Response<GetMeResponse>, Status> {
        let caller = request.extensions().get::<Arc<Caller>>().ok_or_else(|| Status::internal("no caller"))?;
        Ok(Response::new(GetMeResponse { user: Some(User { id: caller.subject.clone(), ..User::default() }) }))
    }
}

fn path(method: &str) -> String {
    format!("/postern.auth.v1.AuthService/{method}")
}

async fn serve() -> AuthServiceClient<tonic::transport::Channel> {
    let demands = Demands::new()
        .method(path("GetMe"), Demand::authenticated())
        .method(path("Login"), Demand::public())
        .method(path("Refresh"), Demand::person())
        .method(path("Logout"), Demand::authenticated().role("admin"));
    let guard = Guard::new(verifier().build().expect("a verifier")).grpc(demands);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let uri = format!("http://{}", listener.local_addr().expect("an address"));
    let server = Server::builder().layer(guard).add_service(AuthServiceServer::new(Echo));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    AuthServiceClient::new(postern_client::endpoint(uri).expect("an address").connect_lazy())
}

fn with<T>(message: T, token: &str) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.metadata_mut().insert("authorization", format!("BEARER {token}").parse().expect("a value"));
    request
}

#[track_caller]
fn refused<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code, reason: &str) {
    let error = postern_client::CallError::from(answer.expect_err("refused"));
    assert_eq!((error.code, error.reason.as_ref().map(postern_client::Reason::as_str)), (code, Some(reason)));
}

#[tokio::test]
async fn each_method_has_its_demand_and_one_without_is_refused() {
    let mut client = serve().await;
    let person = new_person().await;
    let token = person["accessToken"].as_str().expect("a token");
    let of_service = service(postern()).token().await.expect("a token");
    let root = stage("/accounts?role=admin", Value::Null).await;

    refused(client.get_me(GetMeRequest {}).await, Code::Unauthenticated, "TOKEN_MISSING");
    refused(client.get_me(with(GetMeRequest {}, "x")).await, Code::Unauthenticated, "TOKEN_INVALID");
    let answer = client.get_me(with(GetMeRequest {}, token)).await.expect("let through").into_inner();
    assert_eq!(answer.user.expect("a user").id, person["id"].as_str().expect("an id"));
    assert!(client.login(LoginRequest::default()).await.is_ok());
    refused(
        client.refresh(with(RefreshRequest::default(), &of_service)).await,
        Code::PermissionDenied,
        "USER_REQUIRED",
    );
    refused(client.logout(with(LogoutRequest::default(), token)).await, Code::PermissionDenied, "ROLE_REQUIRED");
    let of_root = root["accessToken"].as_str().expect("a token");
    assert!(client.logout(with(LogoutRequest::default(), of_root)).await.is_ok());
    let undeclared = client.sign_up(with(SignUpRequest::default(), of_root)).await;
    refused(undeclared, Code::PermissionDenied, "ROLE_REQUIRED");

    let mut twice = with(GetMeRequest {}, token);
    twice.metadata_mut().append("authorization", "Bearer x".parse().expect("a value"));
    refused(client.get_me(twice).await, Code::Unauthenticated, "TOKEN_INVALID");
}

#[tokio::test]
async fn http_routes_answer_as_postern_does() {
    let guard = Guard::new(verifier().build().expect("a verifier"));
    let whoami = async |Extension(caller): Extension<Arc<Caller>>| caller.username.clone();
    let demand = || Demand::person().verified_email();
    let routes = Router::new()
        .route("/me", get(whoami).layer(guard.http(Demand::person())))
        .route("/verified", get(whoami).layer(guard.http(demand())));
    let person = new_person().await;
    let call = async |path: &str, authorization: Option<&str>| {
        let mut request = Request::get(path);
        if let Some(value) = authorization {
            request = request.header("authorization", value);
        }
        let answer = routes.clone().oneshot(request.body(Body::empty()).expect("a request")).await.expect("an answer");
        let challenge = answer.headers().get("www-authenticate").map(|value| value.to_str().expect("text").to_owned());
        let status = answer.status();
        let body = axum::body::to_bytes(answer.into_body(), 10_000).await.expect("a body");
        (status, challenge, serde_json::from_slice::<Value>(&body).unwrap_or_default())
    };
    let own = format!("Bearer {}", person["accessToken"].as_str().expect("a token"));
    assert_eq!(call("/me", Some(&own)).await.0, StatusCode::OK);
    let (status, challenge, body) = call("/me", None).await;
    assert_eq!((status, challenge.as_deref()), (StatusCode::UNAUTHORIZED, Some("Bearer")));
    assert_eq!(body["error"]["details"][0]["reason"], "TOKEN_MISSING");
    let (status, challenge, _) = call("/me", Some("Bearer x")).await;
    assert_eq!((status, challenge.as_deref()), (StatusCode::UNAUTHORIZED, Some("Bearer error=\"invalid_token\"")));
    let (status, challenge, body) = call("/verified", Some(&own)).await;
    assert_eq!((status, challenge.as_deref()), (StatusCode::FORBIDDEN, Some("Bearer error=\"insufficient_scope\"")));
    assert_eq!(body["error"]["details"][0]["reason"], "EMAIL_NOT_VERIFIED");
}
