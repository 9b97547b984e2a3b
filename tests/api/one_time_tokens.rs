//! Tokens from mails: what each is valid for and for how long, and which sessions remain afterwards.

use postern::{
    domain::{mail::MailKind, one_time::Purpose},
    mail::SendErrorKind,
    proto::{ConfirmEmailChangeRequest, ResetPasswordRequest, SignUpRequest, TokenPair, User, VerifyEmailRequest},
};
use time::ext::NumericalDuration as _;
use tonic::{
    Code::{FailedPrecondition, InvalidArgument, Unauthenticated},
    Status,
};

use crate::{
    app::{Failure, MASTER_KEY, NEW_PASSWORD, PASSWORD, START, TestApp, assert_fails, authorized, claim},
    mail::{failed_mails, let_retries_come},
    support::{Database, on_each_engine, wait_until},
};

on_each_engine![
    a_one_time_token_lives_as_long_as_its_purpose_allows,
    a_one_time_token_works_once_and_for_its_purpose_only,
    every_invalid_one_time_token_gets_the_same_answer,
    a_verification_token_verifies_only_its_own_registration,
    a_one_time_token_ends_when_the_address_changes,
    the_next_access_token_contains_the_verified_address,
    what_somebody_else_had_before_the_verification_ends,
    a_session_of_the_account_proves_who_verifies,
    a_session_of_another_account_or_an_ended_one_proves_nothing,
    with_required_verification_the_mailed_token_enables_login,
    a_reset_ends_every_session_and_every_token,
    a_change_of_password_leaves_only_the_session_that_it_opens,
    a_refused_password_leaves_the_token_unused,
    a_one_time_token_of_another_master_key_is_refused,
];

fn address(name: &str) -> String {
    format!("{name}@example.com")
}

/// The address that a token of this purpose is mailed to.
fn recipient(purpose: Purpose, name: &str) -> String {
    match purpose {
        Purpose::VerifyEmail | Purpose::ResetPassword => address(name),
        Purpose::ChangeEmail => format!("new-{name}@example.com"),
    }
}

/// Signs up `name` and returns the verification token.
async fn sign_up(app: &TestApp<'_>, name: &str) -> String {
    app.sign_up(name).await;
    app.token_to(&address(name), MailKind::VerifyEmail).await
}

/// Requests a token for `name`, logging in first if the purpose requires it.
async fn ask(app: &TestApp<'_>, purpose: Purpose, name: &str) {
    let asked = match purpose {
        Purpose::VerifyEmail => app.resend_verification(&address(name)).await,
        Purpose::ResetPassword => app.request_reset(&address(name)).await,
        Purpose::ChangeEmail => {
            let tokens = app.log_in(name).await;
            app.request_email_change(&tokens.access_token, &recipient(purpose, name)).await
        }
    };
    asked.unwrap_or_else(|failure| panic!("{purpose:?}: {failure:?}"));
}

async fn receive(app: &TestApp<'_>, purpose: Purpose, name: &str) -> String {
    app.token_to(&recipient(purpose, name), MailKind::carrying(purpose)).await
}

async fn token(app: &TestApp<'_>, purpose: Purpose, name: &str) -> String {
    ask(app, purpose, name).await;
    receive(app, purpose, name).await
}

/// Presents a token to the RPC of its purpose.
async fn present(app: &TestApp<'_>, purpose: Purpose, token: &str) -> Result<(), Status> {
    let (token, mut account) = (token.to_owned(), app.account());
    match purpose {
        Purpose::VerifyEmail => account.verify_email(VerifyEmailRequest { token }).await.map(drop),
        Purpose::ResetPassword => {
            let request = ResetPasswordRequest { token, new_password: NEW_PASSWORD.to_owned() };
            account.reset_password(request).await.map(drop)
        }
        Purpose::ChangeEmail => account.confirm_email_change(ConfirmEmailChangeRequest { token }).await.map(drop),
    }
}

/// Asserts that a token works.
async fn assert_good(app: &TestApp<'_>, purpose: Purpose, token: &str) {
    present(app, purpose, token).await.unwrap_or_else(|status| panic!("{purpose:?}: {status:?}"));
}

/// Asserts that a token is refused with the one error for all tokens.
async fn assert_dead(app: &TestApp<'_>, purpose: Purpose, token: &str, what: &str) {
    let Err(status) = present(app, purpose, token).await else {
        panic!("{what}, at {purpose:?}: the token was accepted");
    };
    let never_existed = present(app, purpose, &"A".repeat(64)).await.expect_err("nobody ever made it");
    for refused in [&status, &never_existed] {
        let expected = (InvalidArgument, never_existed.message(), never_existed.details());
        assert_eq!((refused.code(), refused.message(), refused.details()), expected, "{what}, at {purpose:?}");
    }
    let failure = Failure::from(status);
    assert_eq!(failure.reason, "ONE_TIME_TOKEN_INVALID", "{what}, at {purpose:?}");
    assert_eq!((failure.fields.len(), failure.retry_delay), (0, None));
}

async fn a_one_time_token_lives_as_long_as_its_purpose_allows(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    for (purpose, lifetime) in
        [(Purpose::VerifyEmail, 24.hours()), (Purpose::ResetPassword, 30.minutes()), (Purpose::ChangeEmail, 24.hours())]
    {
        let kind = MailKind::carrying(purpose).as_str();
        let (early, late) = (format!("early-{kind}"), format!("late-{kind}"));
        for name in [&early, &late] {
            sign_up(&app, name).await;
        }
        // Both mails are sent twenty minutes after they were requested.
        app.mails.fail_with(Some(SendErrorKind::Connection));
        for name in [&early, &late] {
            ask(&app, purpose, name).await;
        }
        let of_kind = format!("kind = '{kind}'");
        wait_until("both have failed", async || (failed_mails(&app, database, &of_kind).await == 2).then_some(()))
            .await;
        app.pass(20.minutes());
        app.mails.fail_with(None);
        let (early, late) = (receive(&app, purpose, &early).await, receive(&app, purpose, &late).await);

        app.pass(lifetime - 20.minutes() - 1.microseconds());
        assert_good(&app, purpose, &early).await;
        app.pass(1.microseconds());
        assert_dead(&app, purpose, &late, "a token at its end").await;
        app.pass(1.hours());
        assert_dead(&app, purpose, &late, "an hour later").await;
    }
    app.stop().await;
}

async fn a_one_time_token_works_once_and_for_its_purpose_only(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    for purpose in Purpose::ALL {
        let name = MailKind::carrying(purpose).as_str();
        sign_up(&app, name).await;
        let token = token(&app, purpose, name).await;
        for other in Purpose::ALL.into_iter().filter(|other| *other != purpose) {
            assert_dead(&app, other, &token, purpose.as_str()).await;
        }
        assert_good(&app, purpose, &token).await;
        for any in Purpose::ALL {
            assert_dead(&app, any, &token, "a used one").await;
        }
    }
    app.stop().await;
}

async fn every_invalid_one_time_token_gets_the_same_answer(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    for purpose in Purpose::ALL {
        let name = MailKind::carrying(purpose).as_str();
        sign_up(&app, name).await;
        let session = app.log_in(name).await;
        let superseded = token(&app, purpose, name).await;
        let good = token(&app, purpose, name).await;
        let bent = format!("{}{}", &good[..63], if good.ends_with('A') { 'B' } else { 'A' });
        let of_another_id = format!("{}{}", &superseded[..20], &good[20..]);
        for (what, text) in [
            ("a superseded token", superseded.as_str()),
            ("one with another end", &bent),
            ("one with the id of another", &of_another_id),
            ("one with something after it", &format!("{good}A")),
            ("one with a padding", &format!("{good}=")),
            ("one with a space", &format!(" {good}")),
            ("the first half of one", &good[..32]),
            ("no base64url", &"*".repeat(64)),
            ("an access token", &session.access_token),
            ("a refresh token", &session.refresh_token),
        ] {
            assert_dead(&app, purpose, text, what).await;
        }
        // Changing the row in the database does not make a token valid for another grant.
        for other in Purpose::ALL.into_iter().filter(|other| *other != purpose) {
            let (from, to) = (purpose.as_str(), other.as_str());
            let turn = |from, to| {
                format!(
                    "UPDATE one_time_tokens SET purpose = '{to}' WHERE purpose = '{from}' \
                     AND user_id = (SELECT id FROM users WHERE username = '{name}')"
                )
            };
            let in_the_way = database.sql.execute(&turn(to, "set_aside")).await;
            assert_eq!(database.sql.execute(&turn(from, to)).await, 1);
            assert_dead(&app, other, &good, "one whose row was changed to another purpose").await;
            database.sql.execute(&turn(to, from)).await;
            assert_eq!(database.sql.execute(&turn("set_aside", to)).await, in_the_way);
        }
        let disable = |disabled| format!("UPDATE users SET disabled = {disabled} WHERE username = '{name}'");
        if purpose != Purpose::VerifyEmail {
            database.sql.execute(&disable(true)).await;
            assert_dead(&app, purpose, &good, "one of a disabled account").await;
            database.sql.execute(&disable(false)).await;
        }
        assert_good(&app, purpose, &good).await;
    }
    app.stop().await;
}

async fn a_verification_token_verifies_only_its_own_registration(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    let before = sign_up(&app, "ada").await;
    // And a token that is still in the outbox when the account is deleted.
    app.mails.fail_with(Some(SendErrorKind::Transient));
    app.sign_up("grace").await;
    wait_until("it has failed", async || (failed_mails(&app, database, "true").await == 1).then_some(())).await;
    assert_eq!(database.sql.execute("DELETE FROM users").await, 2);
    app.mails.fail_with(None);
    let_retries_come(&app, database);
    for name in ["ada", "grace"] {
        let request =
            SignUpRequest { username: format!("not-{name}"), email: address(name), password: NEW_PASSWORD.to_owned() };
        app.try_sign_up(request).await.expect("the address is free again");
    }
    let after = app.token_to("ada@example.com", MailKind::VerifyEmail).await;
    app.token_to("grace@example.com", MailKind::VerifyEmail).await;
    app.assert_no_more_mail().await;
    assert_dead(&app, Purpose::VerifyEmail, &before, "one of an earlier registration").await;
    assert_eq!(database.sql.number("SELECT count(*) FROM users WHERE email_verified").await, 0);
    assert_good(&app, Purpose::VerifyEmail, &after).await;
    assert_eq!(database.sql.number("SELECT count(*) FROM users WHERE email_verified").await, 1);
    app.stop().await;
}

async fn a_one_time_token_ends_when_the_address_changes(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    let verification = sign_up(&app, "ada").await;
    let reset = token(&app, Purpose::ResetPassword, "ada").await;
    let change = token(&app, Purpose::ChangeEmail, "ada").await;
    let changed = app.account().confirm_email_change(ConfirmEmailChangeRequest { token: change }).await;
    let user = changed.expect("a change").into_inner().user.expect("a user");
    assert_eq!((user.email.as_str(), user.email_verified), ("new-ada@example.com", true));
    let notice = app.mail_to("ada@example.com", MailKind::EmailChanged).await;
    assert!(notice.content.text.contains("new-ada (at) example (dot) com"), "{}", notice.content.text);
    for (purpose, token) in [(Purpose::VerifyEmail, &verification), (Purpose::ResetPassword, &reset)] {
        assert_dead(&app, purpose, token, "one for the previous address").await;
    }
    // They do not become valid again with the address.
    database.sql.execute("UPDATE users SET email = 'ada@example.com'").await;
    for (purpose, token) in [(Purpose::VerifyEmail, &verification), (Purpose::ResetPassword, &reset)] {
        assert_dead(&app, purpose, token, "one from before two changes").await;
    }

    // This holds for every way to change it.
    let verification = sign_up(&app, "grace").await;
    let reset = token(&app, Purpose::ResetPassword, "grace").await;
    let rename = |from, to| format!("UPDATE users SET email = '{to}@example.com' WHERE email = '{from}@example.com'");
    assert_eq!(database.sql.execute(&rename("grace", "hopper")).await, 1);
    for (purpose, token) in [(Purpose::VerifyEmail, &verification), (Purpose::ResetPassword, &reset)] {
        assert_dead(&app, purpose, token, "one for another address").await;
    }
    assert_eq!(database.sql.number("SELECT count(*) FROM users WHERE email_verified").await, 1);
    database.sql.execute(&rename("hopper", "grace")).await;
    assert_good(&app, Purpose::VerifyEmail, &verification).await;
    app.stop().await;
}

async fn the_next_access_token_contains_the_verified_address(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    let token = sign_up(&app, "ada").await;
    let before = app.log_in("ada").await;
    assert_eq!(claim(&before, "email_verified"), serde_json::json!(false));
    app.assert_no_more_mail().await;
    app.pass(1.minutes());
    let user = verify_as(&app, &before, token).await;
    assert!(user.email_verified);
    assert_eq!(user.update_time.expect("a time").seconds, (START + 1.minutes()).unix_timestamp());
    assert_eq!(app.me(&before.access_token).await, Ok(user), "the old access token stays valid");
    let refreshed = app.refresh(&before.refresh_token).await.expect("the next tokens");
    for tokens in [refreshed, app.log_in("ada").await] {
        assert_eq!(claim(&tokens, "email_verified"), serde_json::json!(true));
    }
    app.resend_verification("ada@example.com").await.expect("the same answer");
    app.assert_no_more_mail().await;
    app.stop().await;
}

/// Verifies with the access token of a session.
async fn verify_as(app: &TestApp<'_>, tokens: &TokenPair, token: String) -> User {
    let request = authorized(&tokens.access_token, VerifyEmailRequest { token });
    app.account().verify_email(request).await.expect("verified").into_inner().user.expect("a user")
}

async fn what_somebody_else_had_before_the_verification_ends(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    // Only a session: the password remains, because most people verify where they have no session.
    let verification = sign_up(&app, "grace").await;
    let session = app.log_in("grace").await;
    assert_good(&app, Purpose::VerifyEmail, &verification).await;
    app.assert_session_over(&session).await;
    app.log_in("grace").await;

    // Somebody signs up with the address of Ada, and asks to move the account to an address of their own.
    let verification = sign_up(&app, "ada").await;
    let change = token(&app, Purpose::ChangeEmail, "ada").await;
    let sessions = [app.log_in("ada").await, app.log_in("ada").await];
    assert_good(&app, Purpose::VerifyEmail, &verification).await;
    for tokens in &sessions {
        app.assert_session_over(tokens).await;
    }
    assert_dead(&app, Purpose::ChangeEmail, &change, "somebody else asked for it").await;
    assert_fails(app.try_log_in("ada@example.com", PASSWORD).await, Unauthenticated, "INVALID_CREDENTIALS");

    let reset = token(&app, Purpose::ResetPassword, "ada").await;
    app.reset_password(&reset, NEW_PASSWORD).await.expect("the owner gets in");
    app.try_log_in("ada@example.com", NEW_PASSWORD).await.expect("a session");

    // The mail of the change may not have been sent yet.
    let verification = sign_up(&app, "eve").await;
    app.mails.fail_with(Some(SendErrorKind::Transient));
    ask(&app, Purpose::ChangeEmail, "eve").await;
    assert_good(&app, Purpose::VerifyEmail, &verification).await;
    app.mails.fail_with(None);
    let_retries_come(&app, database);
    app.mail_to("eve@example.com", MailKind::EmailChangeRequested).await;
    assert_fails(app.try_log_in("eve@example.com", PASSWORD).await, Unauthenticated, "INVALID_CREDENTIALS");
    app.stop().await;
}

async fn a_session_of_the_account_proves_who_verifies(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    let verification = sign_up(&app, "ada").await;
    let change = token(&app, Purpose::ChangeEmail, "ada").await;
    let (own, other) = (app.log_in("ada").await, app.log_in("ada").await);
    assert!(verify_as(&app, &own, verification).await.email_verified);
    for tokens in [&own, &other] {
        app.me(&tokens.access_token).await.expect("the session goes on");
        app.refresh(&tokens.refresh_token).await.expect("the session goes on");
    }
    app.log_in("ada").await;
    assert_good(&app, Purpose::ChangeEmail, &change).await;
    app.stop().await;
}

async fn a_session_of_another_account_or_an_ended_one_proves_nothing(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    let of_ada = sign_up(&app, "ada").await;
    let (ended, session) = (app.log_in("ada").await, app.log_in("ada").await);
    let of_grace = sign_up(&app, "grace").await;
    let grace = app.log_in("grace").await;
    verify_as(&app, &grace, of_ada).await;
    app.assert_session_over(&session).await;
    app.me(&grace.access_token).await.expect("her session goes on, because it is about another account");
    verify_as(&app, &ended, of_grace).await;
    app.assert_session_over(&grace).await;
    app.stop().await;
}

async fn with_required_verification_the_mailed_token_enables_login(database: &Database) {
    let app = TestApp::start(database, &["--require-verified-email"]).await;
    let verification = sign_up(&app, "ada").await;
    assert_fails(app.try_log_in("ada@example.com", PASSWORD).await, FailedPrecondition, "EMAIL_NOT_VERIFIED");
    assert_good(&app, Purpose::VerifyEmail, &verification).await;
    assert_eq!(claim(&app.log_in("ada").await, "email_verified"), serde_json::json!(true));

    // The token of a reset was mailed too.
    let verification = sign_up(&app, "grace").await;
    let reset = token(&app, Purpose::ResetPassword, "grace").await;
    assert_good(&app, Purpose::ResetPassword, &reset).await;
    app.try_log_in("grace@example.com", NEW_PASSWORD).await.expect("a session");
    assert_dead(&app, Purpose::VerifyEmail, &verification, "one for an address that is verified already").await;
    app.stop().await;
}

async fn a_reset_ends_every_session_and_every_token(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    let verification = sign_up(&app, "ada").await;
    sign_up(&app, "grace").await;
    let sessions = [app.log_in("ada").await, app.log_in("ada").await];
    let of_grace = app.log_in("grace").await;
    let change = token(&app, Purpose::ChangeEmail, "ada").await;
    app.mail_to("ada@example.com", MailKind::EmailChangeRequested).await;
    let reset = token(&app, Purpose::ResetPassword, "ada").await;

    app.reset_password(&reset, NEW_PASSWORD).await.expect("a new password");
    for tokens in &sessions {
        app.assert_session_over(tokens).await;
    }
    assert_eq!(database.sql.number("SELECT count(*) FROM sessions WHERE revoke_time IS NULL").await, 1);
    app.me(&of_grace.access_token).await.expect("somebody else's session");
    assert_dead(&app, Purpose::ChangeEmail, &change, "a pending change").await;
    assert_dead(&app, Purpose::VerifyEmail, &verification, "the reset verified the address").await;
    assert_fails(app.try_log_in("ada@example.com", PASSWORD).await, Unauthenticated, "INVALID_CREDENTIALS");
    app.try_log_in("ada@example.com", NEW_PASSWORD).await.expect("a session");
    app.mail_to("ada@example.com", MailKind::PasswordChanged).await;

    // Mail that is still in the outbox is not sent either.
    let reset = token(&app, Purpose::ResetPassword, "grace").await;
    app.mails.fail_with(Some(SendErrorKind::Transient));
    for purpose in [Purpose::VerifyEmail, Purpose::ChangeEmail] {
        ask(&app, purpose, "grace").await;
    }
    wait_until("all have failed", async || (failed_mails(&app, database, "true").await == 3).then_some(())).await;
    app.reset_password(&reset, NEW_PASSWORD).await.expect("a new password");
    app.mails.fail_with(None);
    let_retries_come(&app, database);
    app.mail_to("grace@example.com", MailKind::PasswordChanged).await;
    app.mail_to("grace@example.com", MailKind::EmailChangeRequested).await;
    app.assert_no_more_mail().await;
    app.stop().await;
}

async fn a_change_of_password_leaves_only_the_session_that_it_opens(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    let verification = sign_up(&app, "ada").await;
    let (own, other) = (app.log_in("ada").await, app.log_in("ada").await);
    let change = token(&app, Purpose::ChangeEmail, "ada").await;
    let reset = token(&app, Purpose::ResetPassword, "ada").await;
    let wrong = app.change_password(&own.access_token, NEW_PASSWORD, NEW_PASSWORD).await;
    assert_fails(wrong, Unauthenticated, "INVALID_CREDENTIALS");
    let weak = app.change_password(&own.access_token, PASSWORD, "ada@example.com").await;
    assert_eq!(assert_fails(weak, InvalidArgument, "INVALID_FIELD").fields, ["new_password"]);
    app.me(&other.access_token).await.expect("the session is still open");

    let fresh = app.change_password(&own.access_token, PASSWORD, NEW_PASSWORD).await.expect("a fresh session");
    for tokens in [&own, &other] {
        app.assert_session_over(tokens).await;
    }
    app.me(&fresh.access_token).await.expect("a live session");
    app.refresh(&fresh.refresh_token).await.expect("the new session can be refreshed");
    assert_eq!(database.sql.number("SELECT count(*) FROM sessions WHERE revoke_time IS NULL").await, 1);
    assert_dead(&app, Purpose::ChangeEmail, &change, "a pending change").await;
    assert_dead(&app, Purpose::ResetPassword, &reset, "a reset").await;
    assert_good(&app, Purpose::VerifyEmail, &verification).await;
    assert_fails(app.try_log_in("ada@example.com", PASSWORD).await, Unauthenticated, "INVALID_CREDENTIALS");
    app.try_log_in("ada@example.com", NEW_PASSWORD).await.expect("a session");
    app.mail_to("ada@example.com", MailKind::PasswordChanged).await;
    app.stop().await;
}

async fn a_refused_password_leaves_the_token_unused(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    sign_up(&app, "wolframite").await;
    let reset = token(&app, Purpose::ResetPassword, "wolframite").await;
    for weak in ["", "short", "password1234", "wolframite77"] {
        let refused = assert_fails(app.reset_password(&reset, weak).await, InvalidArgument, "INVALID_FIELD");
        assert_eq!(refused.fields, ["new_password"], "{weak}");
    }
    let refused = assert_fails(app.reset_password("", "short").await, InvalidArgument, "INVALID_FIELD");
    assert_eq!(refused.fields[0], "token");
    app.log_in("wolframite").await;
    assert_good(&app, Purpose::ResetPassword, &reset).await;
    app.stop().await;
}

async fn a_one_time_token_of_another_master_key_is_refused(database: &Database) {
    let [one, another] =
        [MASTER_KEY.to_owned(), MASTER_KEY.replace("AAECAw", "AwIBAA")].map(|key| format!("--master-key={key}"));
    let app = TestApp::start(database, &[&one]).await;
    let before = sign_up(&app, "ada").await;
    // Keys that were encrypted with one master key would prevent a start with another.
    database.sql.execute("DELETE FROM signing_keys").await;
    let app = app.restart(&[&another]).await;
    assert_dead(&app, Purpose::VerifyEmail, &before, "one of another master key").await;
    let after = token(&app, Purpose::VerifyEmail, "ada").await;
    assert_good(&app, Purpose::VerifyEmail, &after).await;
    app.stop().await;
}
