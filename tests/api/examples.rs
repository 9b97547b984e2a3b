//! The example of a service that accepts Postern's tokens, run against a real Postern.

#[path = "../../examples/verify_tokens.rs"]
#[expect(dead_code, reason = "`main` is for people; the test calls the rest")]
mod verify_tokens;

use axum::{Router, body::Body};
use http::{Request, StatusCode, header};
use http_body_util::BodyExt as _;
use tonic::transport::Endpoint;
use tower::ServiceExt as _;

use crate::{
    app::TestApp,
    support::{Database, on_each_engine},
};

on_each_engine![the_example_accepts_a_token_and_refuses_one_that_is_not_for_it];

async fn get(router: &Router, path: &str, token: &str) -> (StatusCode, String) {
    let request = Request::get(path).header(header::AUTHORIZATION, format!("Bearer {token}"));
    let response = router.clone().oneshot(request.body(Body::empty()).expect("a request")).await.expect("infallible");
    let status = response.status();
    let body = response.into_body().collect().await.expect("a body").to_bytes();
    (status, String::from_utf8(body.to_vec()).expect("text"))
}

async fn the_example_accepts_a_token_and_refuses_one_that_is_not_for_it(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    app.sign_up("ada").await;
    let tokens = app.log_in("ada").await;
    let service = async |audience: &str| {
        let verifier = verify_tokens::Verifier::fetch(app.addresses.http, "http://localhost:8080", audience).await;
        let postern = Endpoint::from_shared(format!("http://{}", app.addresses.grpc)).expect("an address");
        verify_tokens::router(verifier.expect("the public keys"), postern.connect_lazy())
    };
    let router = service("postern").await;
    let refused = (StatusCode::UNAUTHORIZED, String::new());

    assert_eq!(get(&router, "/hello", &tokens.access_token).await, (StatusCode::OK, "Hello, ada!\n".to_owned()));
    let account = (StatusCode::OK, "ada@example.com\n".to_owned());
    assert_eq!(get(&router, "/account", &tokens.access_token).await, account);
    assert_eq!(get(&router, "/hello", &tokens.refresh_token).await, refused, "a refresh token is not an access token");
    assert_eq!(get(&router, "/hello", &format!("{}A", tokens.access_token)).await, refused);
    assert_eq!(get(&router, "/hello", "").await, refused);
    assert_eq!(get(&service("another").await, "/hello", &tokens.access_token).await, refused, "another audience");

    app.log_out(&tokens.refresh_token).await.expect("logged out");
    assert_eq!(get(&router, "/account", &tokens.access_token).await, refused, "Postern knows of the logout at once");
    assert_eq!(get(&router, "/hello", &tokens.access_token).await.0, StatusCode::OK, "the keys alone do not");
    drop(router);
    app.stop().await;
}
