//! Limits on calls, tested with raw HTTP/2 where no gRPC client would send the request. No input of a caller is
//! answered with INTERNAL.

use http_body_util::{BodyExt as _, Full};
use hyper::{
    Method, Request,
    body::Bytes,
    client::conn::http2::{SendRequest, handshake},
    header::{HeaderMap, HeaderValue},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use postern::proto::{LoginRequest, SignUpRequest};
use prost::Message as _;
use tonic::{
    Code::{self, DeadlineExceeded, InvalidArgument, Ok as Fine, Unauthenticated, Unimplemented},
    Status,
};

use crate::{
    app::{Failure, PASSWORD, TestApp, assert_fails},
    support::{Database, Engine, with_database},
};

const LOGIN: &str = "/postern.auth.v1.AuthService/Login";
const GET_ME: &str = "/postern.auth.v1.AuthService/GetMe";

/// An HTTP/2 connection that knows nothing of gRPC.
struct Wire {
    sender: SendRequest<Full<Bytes>>,
}

/// The response: its headers, and the status from the headers or the trailers.
struct Answer {
    headers: HeaderMap,
    failure: Failure,
}

impl Answer {
    #[track_caller]
    fn assert(&self, code: Code, reason: &str) {
        let failure = &self.failure;
        assert_eq!((failure.code, failure.reason.as_str()), (code, reason), "{failure:?}");
    }

    fn request_id(&self) -> &str {
        self.headers.get("x-request-id").and_then(|id| id.to_str().ok()).unwrap_or_default()
    }
}

impl Wire {
    async fn connect(app: &TestApp<'_>) -> Self {
        let stream = tokio::net::TcpStream::connect(app.addresses.grpc).await.expect("a connection");
        let (sender, connection) =
            handshake(TokioExecutor::new(), TokioIo::new(stream)).await.expect("an HTTP/2 connection");
        tokio::spawn(connection);
        Self { sender }
    }

    async fn call(&mut self, path: &str, headers: &[(&'static str, &[u8])], body: Vec<u8>) -> Answer {
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(format!("http://postern{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers");
        for (name, value) in headers {
            request = request.header(*name, HeaderValue::from_bytes(value).expect("a header value"));
        }
        let request = request.body(Full::new(Bytes::from(body))).expect("a request");
        let response = self.sender.send_request(request).await.expect("an answer");
        let headers = response.headers().clone();
        let body = response.into_body().collect().await.expect("a whole answer");
        let status = Status::from_header_map(&headers).or_else(|| Status::from_header_map(body.trailers()?));
        Answer { headers, failure: status.expect("a gRPC status").into() }
    }
}

/// A message in its gRPC frame.
fn framed(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).expect("small");
    [&[0], length.to_be_bytes().as_slice(), message].concat()
}

fn login() -> Vec<u8> {
    let message = LoginRequest { email: "ada@example.com".to_owned(), password: PASSWORD.to_owned() };
    framed(&message.encode_to_vec())
}

async fn with_app(test: impl AsyncFnOnce(&TestApp<'_>, &Database)) {
    with_database(Engine::Sqlite, async |database| {
        let app = TestApp::start(database, &[]).await;
        app.sign_up("ada").await;
        test(&app, database).await;
        app.abandon();
    })
    .await;
}

#[tokio::test]
async fn a_message_of_more_than_64_kib_is_bad_input() {
    with_app(async |app, database| {
        let email = "grace@example.com".to_owned();
        let request =
            |username: String| SignUpRequest { username, email: email.clone(), password: PASSWORD.to_owned() };
        let failure = app.try_sign_up(request("a".repeat(65 * 1024))).await;
        let failure = assert_fails(failure, InvalidArgument, "INVALID_FIELD");
        assert_eq!(failure.fields, [""], "the fields were not checked");
        // Just within the limit: the message is read, and its field is invalid.
        let failure = app.try_sign_up(request("a".repeat(64 * 1024 - 200))).await;
        assert_eq!(assert_fails(failure, InvalidArgument, "INVALID_FIELD").fields, ["username"]);
        // A frame that only claims this size, and one that claims 4 GiB.
        let mut wire = Wire::connect(app).await;
        for length in [65 * 1024_u32, u32::MAX] {
            let frame = [&[0], length.to_be_bytes().as_slice(), b"abc"].concat();
            wire.call(LOGIN, &[], frame).await.assert(InvalidArgument, "INVALID_FIELD");
        }
        assert_eq!(database.sql.number("SELECT count(*) FROM users").await, 1);
    })
    .await;
}

#[tokio::test]
async fn a_malformed_message_is_bad_input_and_the_connection_stays_open() {
    with_app(async |app, database| {
        let mut wire = Wire::connect(app).await;
        let good = login();
        wire.call(LOGIN, &[], good.clone()).await.assert(Fine, "");
        for (what, body) in [
            ("nothing at all", Vec::new()),
            ("half a frame header", good[..3].to_vec()),
            ("a frame header alone", good[..5].to_vec()),
            ("a truncated frame", good[..good.len() - 1].to_vec()),
            ("a compressed flag without an encoding", [&[1], &good[1..]].concat()),
            ("a flag that does not exist", [&[2], &good[1..]].concat()),
            ("a field without its value", framed(&[0x0a])),
            ("a length beyond the message", framed(&[0x0a, 0x7f, b'a'])),
            ("a field of another type", framed(&[0x08, 0x01])),
            ("text that is not UTF-8", framed(&[0x0a, 0x02, 0xff, 0xfe])),
            ("field number zero", framed(&[0x02, 0x00])),
            ("a varint without end", framed(&[0xff; 11])),
            ("an end of no group", framed(&[0x0c])),
        ] {
            let answer = wire.call(LOGIN, &[], body).await;
            assert_eq!(answer.failure.code, InvalidArgument, "{what}: {:?}", answer.failure);
            assert_eq!(answer.failure.reason, "INVALID_FIELD", "{what}");
        }
        wire.call(LOGIN, &[], good).await.assert(Fine, "");
        assert_eq!(database.sql.number("SELECT count(*) FROM sessions").await, 2);
    })
    .await;
}

#[tokio::test]
async fn an_unknown_field_is_ignored() {
    with_app(async |app, _| {
        let mut wire = Wire::connect(app).await;
        // Field 1000, of a later release.
        let message = [&login()[5..], &[0xc2, 0x3e, 0x01, b'x']].concat();
        wire.call(LOGIN, &[], framed(&message)).await.assert(Fine, "");
        wire.call(GET_ME, &[], framed(&message)).await.assert(Unauthenticated, "TOKEN_MISSING");
    })
    .await;
}

#[tokio::test]
async fn a_path_that_differs_from_that_of_an_rpc_reaches_none() {
    with_app(async |app, database| {
        let mut wire = Wire::connect(app).await;
        for path in [
            "/",
            "//postern.auth.v1.AuthService/Login",
            "/postern.auth.v1.AuthService//Login",
            "/postern.auth.v1.AuthService/Login/",
            "/postern.auth.v1.AuthService/login",
            "/postern.auth.v1.AuthService/LOGIN",
            "/Postern.auth.v1.AuthService/Login",
            "/postern.auth.v1.authservice/Login",
            "/postern.auth.v1.AuthService/%4cogin",
            "/postern.auth.v1.AuthService/Login%00",
            "/postern.auth.v1.AuthService/./Login",
            "/x/../postern.auth.v1.AuthService/Login",
            "/postern.auth.v1.AuthService/Impersonate",
            "/postern.auth.v1.AuthService/",
            "/postern.auth.v1.AdminService/ListPasswords",
            "/postern.auth.v1.AdminService/listUsers",
            "/postern.auth.v2.AuthService/Login",
        ] {
            let answer = wire.call(path, &[], login()).await;
            assert_eq!(answer.failure.code, Unimplemented, "{path}: {:?}", answer.failure);
        }
        assert_eq!(database.sql.number("SELECT count(*) FROM sessions").await, 0);
        wire.call(LOGIN, &[], login()).await.assert(Fine, "");
    })
    .await;
}

#[tokio::test]
async fn a_passed_deadline_is_reported_and_nothing_is_written() {
    with_app(async |app, database| {
        let mut wire = Wire::connect(app).await;
        for timeout in [b"1n".as_slice(), b"0m", b"0S"] {
            wire.call(LOGIN, &[("grpc-timeout", timeout)], login()).await.assert(DeadlineExceeded, "");
        }
        assert_eq!(database.sql.number("SELECT count(*) FROM sessions").await, 0);
        for timeout in [b"60S".as_slice(), b"8H", b"nonsense", b"-1S", b"\xff"] {
            wire.call(LOGIN, &[("grpc-timeout", timeout)], login()).await.assert(Fine, "");
        }
    })
    .await;
}

#[tokio::test]
async fn a_valid_request_id_is_returned_and_any_other_is_replaced() {
    with_app(async |app, _| {
        let mut wire = Wire::connect(app).await;
        let long = [b'a'; 129];
        for sane in [b"order-66".as_slice(), b"a", &long[..128], b"01/{}[]:;'\"<>"] {
            for path in [LOGIN, GET_ME, "/no.such.Service/Rpc"] {
                let answer = wire.call(path, &[("x-request-id", sane)], login()).await;
                assert_eq!(answer.request_id().as_bytes(), sane, "{path}");
            }
        }
        let mut seen = std::collections::BTreeSet::new();
        let insane: [&[(&'static str, &[u8])]; 5] = [
            &[],
            &[("x-request-id", b"")],
            &[("x-request-id", &long)],
            &[("x-request-id", b"two words")],
            &[("x-request-id", b"caf\xe9")],
        ];
        for headers in insane {
            let answer = wire.call(LOGIN, headers, login()).await;
            assert!(uuid::Uuid::try_parse(answer.request_id()).is_ok(), "{headers:?}: {}", answer.request_id());
            assert!(seen.insert(answer.request_id().to_owned()), "every call gets its own id");
        }
    })
    .await;
}

#[tokio::test]
async fn unknown_metadata_is_ignored() {
    with_app(async |app, _| {
        let mut wire = Wire::connect(app).await;
        let headers: [(&'static str, &[u8]); 6] = [
            ("x-forwarded-for", b"10.0.0.1"),
            ("x-user-id", b"01920000-0000-7000-8000-000000000000"),
            ("x-roles", b"admin"),
            ("traceparent", b"nonsense"),
            ("authorization", b"Basic YWRhOnNlY3JldA=="),
            ("x-anything-bin", b"AAAA"),
        ];
        wire.call(LOGIN, &headers, login()).await.assert(Fine, "");
        wire.call(GET_ME, &headers, framed(&[])).await.assert(Unauthenticated, "TOKEN_MISSING");
        for authorization in [b"Bearer".as_slice(), b"Bearer ", b"Bearer \xff", b"bearer a b"] {
            let headers = [("authorization", authorization)];
            wire.call(GET_ME, &headers, framed(&[])).await.assert(Unauthenticated, "TOKEN_INVALID");
        }
        let access_token = app.log_in("ada").await.access_token;
        for scheme in ["Bearer", "bearer", "BEARER"] {
            let value = format!("{scheme} {access_token}");
            wire.call(GET_ME, &[("authorization", value.as_bytes())], framed(&[])).await.assert(Fine, "");
        }
        let value = format!("Bearer {access_token}");
        let twice = [("authorization", value.as_bytes()), ("authorization", value.as_bytes())];
        wire.call(GET_ME, &twice, framed(&[])).await.assert(Unauthenticated, "TOKEN_INVALID");
    })
    .await;
}
