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

#[test]
fn a_reason_of_a_later_release_is_kept_as_text() {
    let details = ErrorDetails::with_error_info("FROM_THE_FUTURE", "postern.auth.v1", HashMap::new());
    let error = CallError::from(tonic::Status::with_error_details(Code::Aborted, "later", details));
    assert_eq!((error.code, error.reason), (Code::Aborted, Some(Reason::Other("FROM_THE_FUTURE".to_owned()))));
    let details = ErrorDetails::with_error_info("TOKEN_EXPIRED", "another.domain", HashMap::new());
    assert_eq!(CallError::from(tonic::Status::with_error_details(Code::Aborted, "", details)).reason, None);
}
