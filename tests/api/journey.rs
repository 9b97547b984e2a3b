//! The main journey from outside: sign up, log in, get me, refresh, log out; and all of it survives a restart.

use postern::proto::{SignUpRequest, TokenPair};
use time::ext::NumericalDuration as _;
use tonic::Code::{AlreadyExists, FailedPrecondition, InvalidArgument, Unauthenticated};

use crate::{
    app::{PASSWORD, START, TestApp, assert_fails, claim},
    support::{Database, on_each_engine},
};

on_each_engine![
    a_person_signs_up_logs_in_refreshes_and_logs_out,
    everything_survives_a_restart,
    a_sign_up_reports_what_is_taken_and_every_invalid_field,
    every_failed_login_gets_the_same_answer,
    with_required_verification_only_the_right_password_learns_that_the_address_is_unverified,
    a_repeated_refresh_after_a_lost_answer_returns_the_same_bytes,
    refresh_with_a_consumed_token_ends_the_session,
    logging_out_everywhere_ends_every_session,
    a_refresh_reads_the_current_roles_and_state,
    an_expired_or_malformed_token_does_not_prevent_a_login,
];

fn request(username: &str, email: &str, password: &str) -> SignUpRequest {
    SignUpRequest { username: username.to_owned(), email: email.to_owned(), password: password.to_owned() }
}

async fn a_person_signs_up_logs_in_refreshes_and_logs_out(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    let reply = app.try_sign_up(request("Ada", "Ada.Lovelace@Example.COM", PASSWORD)).await.expect("an account");
    let user = reply.user.expect("a user");
    assert_eq!((user.username.as_str(), user.email.as_str()), ("Ada", "ada.lovelace@example.com"));
    assert_eq!(user.roles, ["user"]);
    assert!(!user.disabled && !user.email_verified);
    let created = user.create_time.expect("a time");
    assert_eq!(created.seconds, START.unix_timestamp());
    assert_eq!(created.nanos, 678_901_000);
    assert_eq!(user.update_time, Some(created));

    let login = app.try_log_in("ADA.lovelace@example.com", PASSWORD).await.expect("a session");
    assert_eq!(login.user.as_ref(), Some(&user));
    let first = login.tokens.expect("tokens");
    assert_eq!(first.token_type, "Bearer");
    assert_eq!(app.me(&first.access_token).await.as_ref(), Ok(&user));

    app.pass(5.minutes());
    let second = app.refresh(&first.refresh_token).await.expect("the next tokens");
    assert_ne!(second.refresh_token, first.refresh_token);
    assert_ne!(second.access_token, first.access_token);
    assert_eq!(app.me(&second.access_token).await.as_ref(), Ok(&user));
    assert_eq!(
        app.me(&first.access_token).await.as_ref(),
        Ok(&user),
        "the old access token stays valid while the session is open"
    );

    app.log_out(&second.refresh_token).await.expect("logged out");
    for tokens in [&first, &second] {
        app.assert_session_over(tokens).await;
    }
    app.log_out(&second.refresh_token).await.expect("a second time is no failure");
    let third = app.try_log_in(&user.email, PASSWORD).await.expect("another session").tokens.expect("tokens");
    assert_eq!(app.me(&third.access_token).await, Ok(user));
    app.stop().await;
}

async fn everything_survives_a_restart(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    let user = app.sign_up("ada").await;
    let (open, over) = (app.log_in("ada").await, app.log_in("ada").await);
    app.log_out(&over.refresh_token).await.expect("logged out");

    let app = app.restart(&[]).await;
    assert_eq!(app.me(&open.access_token).await, Ok(user.clone()), "the signing key is the same");
    app.assert_session_over(&over).await;
    assert_fails(app.try_sign_up(request("ada2", &user.email, PASSWORD)).await, AlreadyExists, "EMAIL_TAKEN");
    let refreshed = app.refresh(&open.refresh_token).await.expect("the refresh key is the same");
    assert_eq!(app.refresh(&open.refresh_token).await.expect("a retry").refresh_token, refreshed.refresh_token);

    let app = app.restart(&[]).await;
    let header = |tokens: &TokenPair| tokens.access_token.split('.').next().map(str::to_owned);
    assert_eq!(header(&app.log_in("ada").await), header(&open), "the header is the same, with the kid");
    assert_eq!(database.sql.number("SELECT count(*) FROM signing_keys").await, 1);
    app.refresh(&refreshed.refresh_token).await.expect("the session goes on");
    app.stop().await;
}

async fn a_sign_up_reports_what_is_taken_and_every_invalid_field(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    app.sign_up("Ada").await;
    let taken = app.try_sign_up(request("grace", "ADA@EXAMPLE.COM", PASSWORD)).await;
    assert_fails(taken, AlreadyExists, "EMAIL_TAKEN");
    let taken = app.try_sign_up(request("aDA", "grace@example.com", PASSWORD)).await;
    assert_fails(taken, AlreadyExists, "USERNAME_TAKEN");
    let wrong = app.try_sign_up(request("-", "ada@", "short")).await;
    let failure = assert_fails(wrong, InvalidArgument, "INVALID_FIELD");
    assert_eq!(failure.fields, ["username", "email", "password"]);
    let wrong = app.try_sign_up(request("grace", "grace@example.com", "")).await;
    assert_eq!(assert_fails(wrong, InvalidArgument, "INVALID_FIELD").fields, ["password"]);
    assert_eq!(database.sql.number("SELECT count(*) FROM users").await, 1);
    app.stop().await;
}

async fn every_failed_login_gets_the_same_answer(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    app.sign_up("ada").await;
    app.sign_up("disabled").await;
    database.sql.execute("UPDATE users SET disabled = true WHERE username = 'disabled'").await;

    let mut answers = Vec::new();
    for (email, password) in [
        ("ada@example.com", "correct horse battery stapler"),
        ("nobody@example.com", PASSWORD),
        ("disabled@example.com", PASSWORD),
    ] {
        let failure = app.try_log_in(email, password).await;
        answers.push(assert_fails(failure, Unauthenticated, "INVALID_CREDENTIALS"));
    }
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
    assert_eq!(database.sql.number("SELECT count(*) FROM sessions").await, 0);
    app.stop().await;
}

async fn with_required_verification_only_the_right_password_learns_that_the_address_is_unverified(database: &Database) {
    let app = TestApp::start(database, &["--require-verified-email"]).await;
    app.sign_up("ada").await;
    let wrong = app.try_log_in("ada@example.com", "correct horse battery stapler").await;
    assert_fails(wrong, Unauthenticated, "INVALID_CREDENTIALS");
    let right = app.try_log_in("ada@example.com", PASSWORD).await;
    assert_fails(right, FailedPrecondition, "EMAIL_NOT_VERIFIED");
    assert_eq!(database.sql.number("SELECT count(*) FROM sessions").await, 0);
    database.sql.execute("UPDATE users SET email_verified = true").await;
    let tokens = app.log_in("ada").await;
    assert_eq!(claim(&tokens, "email_verified"), serde_json::json!(true));
    app.stop().await;
}

async fn a_repeated_refresh_after_a_lost_answer_returns_the_same_bytes(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    app.sign_up("ada").await;
    let first = app.log_in("ada").await;
    app.pass(1.minutes());
    let second = app.refresh(&first.refresh_token).await.expect("the next tokens");
    for _ in 0..3 {
        app.pass(3.seconds());
        let again = app.refresh(&first.refresh_token).await.expect("the same again");
        assert_eq!(again.refresh_token, second.refresh_token);
        assert_eq!(again.refresh_token_expire_time, second.refresh_token_expire_time);
        app.me(&again.access_token).await.expect("an access token that works");
    }
    let third = app.refresh(&second.refresh_token).await.expect("one lineage, and it goes on");
    app.me(&third.access_token).await.expect("a live session");
    app.stop().await;
}

async fn refresh_with_a_consumed_token_ends_the_session(database: &Database) {
    let app = TestApp::start(database, &["--refresh-retry-window=0s"]).await;
    app.sign_up("ada").await;
    let untouched = app.log_in("ada").await;
    let first = app.log_in("ada").await;
    let second = app.refresh(&first.refresh_token).await.expect("the next tokens");
    assert_fails(app.refresh(&first.refresh_token).await, Unauthenticated, "REFRESH_TOKEN_INVALID");
    for tokens in [&first, &second] {
        app.assert_session_over(tokens).await;
    }
    app.me(&untouched.access_token).await.expect("another session of the same user");

    // The token before the previous one also ends the session within the retry window.
    let app = app.restart(&["--refresh-retry-window=60s"]).await;
    let first = app.log_in("ada").await;
    let second = app.refresh(&first.refresh_token).await.expect("the next tokens");
    let third = app.refresh(&second.refresh_token).await.expect("the next tokens");
    assert_fails(app.refresh(&first.refresh_token).await, Unauthenticated, "REFRESH_TOKEN_INVALID");
    app.assert_session_over(&third).await;
    app.stop().await;
}

async fn logging_out_everywhere_ends_every_session(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    app.sign_up("ada").await;
    app.sign_up("grace").await;
    let (first, second, of_grace) = (app.log_in("ada").await, app.log_in("ada").await, app.log_in("grace").await);
    app.pass(1.hours());
    assert_fails(app.me(&first.access_token).await, Unauthenticated, "TOKEN_EXPIRED");
    app.log_out_everywhere(&first.refresh_token).await.expect("an expired access token does not matter");
    for tokens in [&first, &second] {
        assert_fails(app.refresh(&tokens.refresh_token).await, Unauthenticated, "REFRESH_TOKEN_INVALID");
    }
    app.log_out_everywhere(&first.refresh_token).await.expect("a second time is no failure");
    app.refresh(&of_grace.refresh_token).await.expect("somebody else's session");

    let (left, alive) = (app.log_in("ada").await, app.log_in("ada").await);
    app.log_out(&left.refresh_token).await.expect("logged out");
    let refused = app.log_out_everywhere(&left.refresh_token).await;
    assert_fails(refused, Unauthenticated, "REFRESH_TOKEN_INVALID");
    app.me(&alive.access_token).await.expect("a session that is none of its business any more");
    app.stop().await;
}

async fn a_refresh_reads_the_current_roles_and_state(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    app.sign_up("ada").await;
    let first = app.log_in("ada").await;
    database.sql.execute("INSERT INTO user_roles (user_id, role) SELECT id, 'admin' FROM users").await;
    let roles = |tokens: &TokenPair| claim(tokens, "roles");
    assert_eq!(roles(&first), serde_json::json!(["user"]));
    let second = app.refresh(&first.refresh_token).await.expect("the next tokens");
    assert_eq!(roles(&second), serde_json::json!(["admin", "user"]));
    let again = app.refresh(&first.refresh_token).await.expect("a retry");
    assert_eq!(roles(&again), serde_json::json!(["admin", "user"]));

    database.sql.execute("UPDATE users SET disabled = true").await;
    app.assert_session_over(&second).await;
    assert_fails(app.try_log_in("ada@example.com", PASSWORD).await, Unauthenticated, "INVALID_CREDENTIALS");
    app.stop().await;
}

async fn an_expired_or_malformed_token_does_not_prevent_a_login(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    app.sign_up("ada").await;
    let stale = app.log_in("ada").await;
    app.log_out(&stale.refresh_token).await.expect("logged out");
    app.pass(1.hours());
    for token in [stale.access_token.as_str(), "", "broken", "a.b.c"] {
        let mut request = tonic::Request::new(postern::proto::LoginRequest {
            email: "ada@example.com".to_owned(),
            password: PASSWORD.to_owned(),
        });
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().expect("metadata"));
        app.auth().login(request).await.unwrap_or_else(|status| panic!("{token}: {status}"));
    }
    app.stop().await;
}
