//! Makes calls inside one process, through every layer of the gRPC API, for `bench/instructions` to count what they cost.
//!
//!     instructions CALL COUNT    CALL is get-me, refresh, introspect, check or health

#![expect(clippy::unwrap_used, clippy::panic, reason = "a benchmark may panic")]

use axum::{Router, body::Body};
use clap::Parser as _;
use http_body_util::BodyExt as _;
use postern::{
    app,
    config::Config,
    domain::env::Env,
    grpc,
    proto::{
        GetMeRequest, IntrospectTokenRequest, LoginRequest, LoginResponse, RefreshRequest, RefreshResponse,
        SignUpRequest, SignUpResponse, TokenPair,
        external::envoy::service::auth::v3::{AttributeContext, CheckRequest, attribute_context},
    },
};
use prost::Message;
use tonic_health::pb::HealthCheckRequest;
use tower::ServiceExt as _;

const AUTH: &str = "postern.auth.v1.AuthService";

#[derive(clap::Parser)]
struct CommandLine {
    #[command(flatten)]
    config: Config,
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let (what, count) = (arguments.next().unwrap(), arguments.next().unwrap().parse::<u32>().unwrap());
    let directory = tempfile::tempdir().unwrap();
    let data = format!("--data-dir={}", directory.path().display());
    let cheap_hashes = ["--argon2-memory-kib=64", "--argon2-iterations=1"];
    let arguments = [&["postern", data.as_str()][..], &cheap_hashes].concat();
    let config = CommandLine::try_parse_from(arguments).unwrap().config;
    let service = app::domain(&config, Env::system()).await.unwrap();
    service.load_revocations().await.unwrap();
    let (router, _health) = grpc::router(service, Env::system(), false).await.unwrap();

    let mut tokens = log_in(&router).await;
    let bearer = format!("Bearer {}", tokens.access_token);
    for _ in 0..count {
        match what.as_str() {
            "get-me" => drop(call(&router, &format!("{AUTH}/GetMe"), &GetMeRequest {}, Some(&bearer)).await),
            "refresh" => {
                let request = RefreshRequest { refresh_token: tokens.refresh_token };
                let answer = call(&router, &format!("{AUTH}/Refresh"), &request, None).await;
                tokens = RefreshResponse::decode(answer).unwrap().tokens.unwrap();
            }
            "introspect" => {
                let request = IntrospectTokenRequest { token: tokens.access_token.clone() };
                drop(call(&router, "postern.auth.v1.TokenService/IntrospectToken", &request, None).await);
            }
            "check" => {
                let request = AttributeContext {
                    request: Some(attribute_context::Request {
                        http: Some(attribute_context::HttpRequest {
                            headers: [("authorization".to_owned(), bearer.clone())].into(),
                            header_map: None,
                        }),
                    }),
                    ..Default::default()
                };
                let request = CheckRequest { attributes: Some(request) };
                drop(call(&router, "envoy.service.auth.v3.Authorization/Check", &request, None).await);
            }
            "health" => drop(call(&router, "grpc.health.v1.Health/Check", &HealthCheckRequest::default(), None).await),
            other => panic!("{other} is not a call"),
        }
    }
}

async fn log_in(router: &Router) -> TokenPair {
    let (email, password) = ("ada@example.com".to_owned(), "correct horse battery staple".to_owned());
    let request = SignUpRequest { username: "ada".to_owned(), email: email.clone(), password: password.clone() };
    SignUpResponse::decode(call(router, &format!("{AUTH}/SignUp"), &request, None).await).unwrap();
    let answer = call(router, &format!("{AUTH}/Login"), &LoginRequest { email, password }, None).await;
    LoginResponse::decode(answer).unwrap().tokens.unwrap()
}

/// The message of the answer.
async fn call(router: &Router, path: &str, message: &impl Message, bearer: Option<&str>) -> axum::body::Bytes {
    let mut frame = vec![0];
    frame.extend(u32::try_from(message.encoded_len()).unwrap().to_be_bytes());
    message.encode(&mut frame).unwrap();
    let mut request =
        http::Request::post(format!("/{path}")).header("content-type", "application/grpc").header("te", "trailers");
    if let Some(bearer) = bearer {
        request = request.header("authorization", bearer);
    }
    let answer = router.clone().oneshot(request.body(Body::from(frame)).unwrap()).await.unwrap();
    assert!(!answer.headers().contains_key("grpc-status"), "{:?}", answer.headers());
    answer.into_body().collect().await.unwrap().to_bytes().split_off(5)
}
