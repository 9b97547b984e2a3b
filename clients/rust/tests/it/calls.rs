//! Errors of the real server, by their reason.

use std::collections::HashMap;

use postern_client::{
    CallError, Reason,
    proto::{LoginRequest, SignUpRequest, auth_service_client::AuthServiceClient},
};
use tonic::Code;
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::stage::postern;

#[tokio::test]
async fn a_refused_call_says_why() {
    let mut client = AuthServiceClient::new(postern());
    let login = LoginRequest { email: "nobody@example.com".to_owned(), password: "wrong".to_owned() };
    let error = CallError::from(client.login(login).await.expect_err("refused"));
    assert_eq!((error.code, error.reason), (Code::Unauthenticated, Some(Reason::InvalidCredentials)));

    let request = SignUpRequest { username: "-".to_owned(), email: "ada".to_owned(), password: "short".to_owned() };
    let error = CallError::from(client.sign_up(request).await.expect_err("refused"));
    assert_eq!((error.code, &error.reason), (Code::InvalidArgument, &Some(Reason::InvalidField)));
    let fields: Vec<_> = error.violations.iter().map(|violation| violation.field.as_str()).collect();
    assert_eq!(fields, ["username", "email", "password"]);
}

/// The function that `docs/errors.md` shows for programs without this library; `tests/libraries/test_snippets.py` compares
/// them.
fn reason_of(status: &tonic::Status) -> Option<String> {
    use tonic_types::StatusExt as _;
    let info = status.get_details_error_info()?;
    (info.domain == "postern.auth.v1").then_some(info.reason)
}

#[test]
fn the_reason_of_an_error_without_this_library() {
    for (domain, wanted) in [("postern.auth.v1", Some("FROM_THE_FUTURE")), ("another", None)] {
        let details = ErrorDetails::with_error_info("FROM_THE_FUTURE", domain, HashMap::new());
        let status = tonic::Status::with_error_details(Code::Aborted, "later", details);
        assert_eq!(reason_of(&status).as_deref(), wanted);
    }
    assert_eq!(reason_of(&tonic::Status::unavailable("")), None);
}

#[test]
fn a_reason_of_a_later_release_is_kept_as_text() {
    let details = ErrorDetails::with_error_info("FROM_THE_FUTURE", "postern.auth.v1", HashMap::new());
    let error = CallError::from(tonic::Status::with_error_details(Code::Aborted, "later", details));
    assert_eq!((error.code, error.reason), (Code::Aborted, Some(Reason::Other("FROM_THE_FUTURE".to_owned()))));
    let details = ErrorDetails::with_error_info("TOKEN_EXPIRED", "another.domain", HashMap::new());
    assert_eq!(CallError::from(tonic::Status::with_error_details(Code::Aborted, "", details)).reason, None);
}
