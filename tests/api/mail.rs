//! The mails of the service: what happens to them when the mail server fails, how many a caller can cause, the targets
//! of their links, and what they reveal in place of an RPC.

use postern::{
    domain::mail::MailKind,
    mail::SendErrorKind,
    proto::{
        RequestPasswordResetRequest, SignUpRequest, VerifyEmailRequest, account_service_client::AccountServiceClient,
    },
};
use time::ext::NumericalDuration as _;
use tonic::{
    Code::{AlreadyExists, InvalidArgument, ResourceExhausted, Unauthenticated},
    Request,
    transport::Endpoint,
};

use crate::{
    app::{NEW_PASSWORD, PASSWORD, TestApp, assert_fails},
    support::{Database, Engine, on_each_engine, wait_until},
};

on_each_engine![
    a_failing_mail_server_does_not_affect_callers_and_mail_arrives_when_it_recovers,
    a_mail_is_given_up_after_a_day_and_kept,
    a_mail_whose_token_expired_while_the_server_was_down_is_dropped,
    a_purge_deletes_only_what_is_expired,
    an_address_gets_ten_mails_at_once_and_then_one_every_six_minutes,
    mails_that_one_client_causes_are_limited_per_minute,
    notices_to_an_address_that_nobody_has_verified_are_limited,
    a_mail_goes_to_the_stored_address_with_the_configured_link,
    a_sign_up_with_a_taken_address_mails_only_its_owner_where_accounts_are_concealed,
    a_change_to_a_taken_address_mails_only_its_owner_where_accounts_are_concealed,
    without_concealment_the_owner_of_a_taken_address_is_not_mailed,
];

/// How many mails failed and wait for another attempt. A claim that is not settled holds for 40 seconds; the first
/// attempts are seconds apart.
pub async fn failed_mails(app: &TestApp<'_>, database: &Database, which: &str) -> i64 {
    let soon = match database.engine {
        Engine::Sqlite => ((app.now() + 30.seconds()).unix_timestamp_nanos() / 1_000).to_string(),
        Engine::Postgres => "clock_timestamp() + interval '30 seconds'".to_owned(),
    };
    let query = format!(
        "SELECT count(*) FROM mail_outbox \
         WHERE attempts > 0 AND dead_time IS NULL AND next_attempt_time < {soon} AND ({which})"
    );
    database.sql.number(&query).await
}

/// Makes mails due that failed once. On PostgreSQL they become due by the database's clock.
pub fn let_retries_come(app: &TestApp<'_>, database: &Database) {
    if database.engine == Engine::Sqlite {
        app.pass(1.seconds());
    }
}

async fn wait_for_failures(app: &TestApp<'_>, database: &Database, count: i64) {
    let what = format!("{count} mails have failed");
    wait_until(&what, async || (failed_mails(app, database, "true").await == count).then_some(())).await;
}

async fn sign_up(app: &TestApp<'_>, name: &str) {
    app.sign_up(name).await;
    app.mail_to(&format!("{name}@example.com"), MailKind::VerifyEmail).await;
}

async fn a_failing_mail_server_does_not_affect_callers_and_mail_arrives_when_it_recovers(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    for trouble in [SendErrorKind::Permanent, SendErrorKind::Transient, SendErrorKind::Connection] {
        let name = format!("{trouble:?}").to_lowercase();
        let (address, new_address) = (format!("{name}@example.com"), format!("new-{name}@example.com"));
        app.mails.fail_with(Some(trouble));
        app.sign_up(&name).await;
        let tokens = app.log_in(&name).await;
        app.request_reset(&address).await.expect("the same answer as always");
        app.request_email_change(&tokens.access_token, &new_address).await.expect("the same answer as always");
        wait_for_failures(&app, database, 4).await;
        assert!(app.mails.sent().is_empty());

        app.mails.fail_with(None);
        let_retries_come(&app, database);
        app.token_to(&address, MailKind::VerifyEmail).await;
        app.mail_to(&address, MailKind::EmailChangeRequested).await;
        app.token_to(&new_address, MailKind::ConfirmEmailChange).await;
        let reset = app.token_to(&address, MailKind::ResetPassword).await;
        app.reset_password(&reset, NEW_PASSWORD).await.expect("a token like any other");
        app.mail_to(&address, MailKind::PasswordChanged).await;
        app.assert_no_more_mail().await;
    }
    app.stop().await;
}

async fn a_mail_is_given_up_after_a_day_and_kept(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    sign_up(&app, "ada").await;
    let tokens = app.log_in("ada").await;
    app.mails.fail_with(Some(SendErrorKind::Transient));
    app.change_password(&tokens.access_token, PASSWORD, NEW_PASSWORD).await.expect("another password");
    wait_for_failures(&app, database, 1).await;
    app.pass(23.hours());
    let second = "SELECT count(*) FROM mail_outbox WHERE attempts > 1";
    wait_until("it is tried again", async || (database.sql.number(second).await == 1).then_some(())).await;
    wait_for_failures(&app, database, 1).await;
    app.pass(1.hours());
    let dead = "SELECT count(*) FROM mail_outbox WHERE dead_time IS NOT NULL";
    wait_until("it is given up", async || (database.sql.number(dead).await == 1).then_some(())).await;

    // It is not sent even if it were due while the server works and other mails are sent.
    app.mails.fail_with(None);
    let long_ago = match database.engine {
        Engine::Sqlite => "0",
        Engine::Postgres => "'2000-01-01'",
    };
    database.sql.execute(&format!("UPDATE mail_outbox SET next_attempt_time = {long_ago}")).await;
    app.pass(1.hours());
    app.request_reset("ada@example.com").await.expect("another mail");
    app.mail_to("ada@example.com", MailKind::ResetPassword).await;
    app.assert_no_more_mail().await;
    assert_eq!(database.sql.text("SELECT kind FROM mail_outbox WHERE dead_time IS NOT NULL").await, "password_changed");
    app.stop().await;
}

async fn a_mail_whose_token_expired_while_the_server_was_down_is_dropped(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    sign_up(&app, "ada").await;
    sign_up(&app, "grace").await;
    app.mails.fail_with(Some(SendErrorKind::Connection));
    app.request_reset("ada@example.com").await.expect("the same answer as always");
    app.pass(1.microseconds());
    app.request_reset("grace@example.com").await.expect("the same answer as always");
    wait_for_failures(&app, database, 2).await;
    app.pass(30.minutes() - 1.microseconds());
    app.mails.fail_with(None);
    let token = app.token_to("grace@example.com", MailKind::ResetPassword).await;
    app.assert_no_more_mail().await;
    assert_eq!(database.sql.number("SELECT count(*) FROM mail_outbox").await, 0, "a dropped mail is deleted");
    app.reset_password(&token, NEW_PASSWORD).await.expect("a microsecond before its end");
    app.stop().await;
}

async fn a_purge_deletes_only_what_is_expired(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    let give_up = "UPDATE mail_outbox SET dead_time = create_time WHERE dead_time IS NULL";
    sign_up(&app, "ada").await;
    app.mails.fail_with(Some(SendErrorKind::Transient));
    app.request_reset("ada@example.com").await.expect("the same answer as always");
    wait_for_failures(&app, database, 1).await;
    database.sql.execute(give_up).await;
    app.pass(31.days());
    app.mails.fail_with(None);
    app.sign_up("grace").await;
    let token = app.token_to("grace@example.com", MailKind::VerifyEmail).await;
    app.mails.fail_with(Some(SendErrorKind::Transient));
    app.request_reset("grace@example.com").await.expect("the same answer as always");
    wait_for_failures(&app, database, 1).await;
    database.sql.execute(give_up).await;

    // The purge runs at the start, and then every hour. It handles mails that were given up last.
    let app = app.restart(&[]).await;
    let dead = "SELECT count(*) FROM mail_outbox WHERE dead_time IS NOT NULL";
    wait_until("one is forgotten", async || (database.sql.number(dead).await < 2).then_some(())).await;
    assert_eq!(database.sql.text("SELECT recipient FROM mail_outbox").await, "grace@example.com");
    assert_eq!(database.sql.number("SELECT count(*) FROM one_time_tokens").await, 2, "both of grace");
    assert_eq!(database.sql.text("SELECT email FROM mail_limits").await, "grace@example.com");
    let verified = app.account().verify_email(VerifyEmailRequest { token }).await;
    verified.expect("a token like any other");
    app.stop().await;
}

async fn an_address_gets_ten_mails_at_once_and_then_one_every_six_minutes(database: &Database) {
    let app = TestApp::start(database, &["--mail-limit-per-client=0"]).await;
    sign_up(&app, "ada").await; // the first mail of the ten
    sign_up(&app, "grace").await;
    for _ in 0..6 {
        for address in ["ada@example.com", "ADA@Example.com", "nobody@example.com"] {
            app.request_reset(address).await.expect("the same answer as always");
        }
    }
    for _ in 0..9 {
        app.mail_to("ada@example.com", MailKind::ResetPassword).await;
    }
    app.assert_no_more_mail().await;

    // This holds for every kind of mail. An authenticated caller gets an error.
    app.resend_verification("ada@example.com").await.expect("the same answer as always");
    let grace = app.log_in("grace").await.access_token;
    database.sql.execute("UPDATE users SET email = 'lovelace@example.com' WHERE username = 'ada'").await;
    let outcome = app.request_email_change(&grace, "ada@example.com").await;
    let refused = assert_fails(outcome, ResourceExhausted, "THROTTLED");
    assert_eq!(refused.retry_delay, Some(std::time::Duration::from_mins(6)));
    app.assert_no_more_mail().await;
    database.sql.execute("UPDATE users SET email = 'ada@example.com' WHERE username = 'ada'").await;
    // Notices are not limited: nobody can suppress them.
    let ada = app.log_in("ada").await.access_token;
    app.request_email_change(&ada, "lovelace@example.com").await.expect("a limit of its own for another address");
    app.mail_to("ada@example.com", MailKind::EmailChangeRequested).await;
    app.mail_to("lovelace@example.com", MailKind::ConfirmEmailChange).await;
    app.change_password(&ada, PASSWORD, NEW_PASSWORD).await.expect("another password");
    app.mail_to("ada@example.com", MailKind::PasswordChanged).await;
    app.assert_no_more_mail().await;

    app.pass(6.minutes() - 1.microseconds());
    app.request_reset("ada@example.com").await.expect("the same answer as always");
    app.assert_no_more_mail().await;
    app.pass(1.microseconds());
    for _ in 0..2 {
        app.request_reset("ada@example.com").await.expect("the same answer as always");
    }
    app.mail_to("ada@example.com", MailKind::ResetPassword).await;
    app.assert_no_more_mail().await;
    app.pass(1.hours());
    for _ in 0..11 {
        app.resend_verification("ada@example.com").await.expect("the same answer as always");
    }
    for _ in 0..10 {
        app.mail_to("ada@example.com", MailKind::VerifyEmail).await;
    }
    app.assert_no_more_mail().await;
    app.stop().await;
}

async fn mails_that_one_client_causes_are_limited_per_minute(database: &Database) {
    // The mails of sign-ups count on their own.
    let app = TestApp::start(database, &["--mail-limit-per-client=4"]).await;
    let names = ["ada", "grace", "joan", "mary"];
    for name in names {
        sign_up(&app, name).await;
    }
    let tokens = app.log_in("mary").await;
    for name in names {
        app.request_reset(&format!("{name}@example.com")).await.expect("the same answer as always");
    }
    app.resend_verification("mary@example.com").await.expect("the same answer as always");
    // An authenticated caller gets an error, after the request was validated.
    let own = app.request_email_change(&tokens.access_token, "mary@example.com").await;
    assert_fails(own, InvalidArgument, "INVALID_FIELD");
    let outcome = app.request_email_change(&tokens.access_token, "somerville@example.com").await;
    let delay = assert_fails(outcome, ResourceExhausted, "THROTTLED").retry_delay.expect("a retry delay");
    assert!(delay <= std::time::Duration::from_secs(20) && !delay.is_zero(), "{delay:?}");
    for name in names {
        app.mail_to(&format!("{name}@example.com"), MailKind::ResetPassword).await;
    }
    app.assert_no_more_mail().await;
    app.stop().await;
}

async fn notices_to_an_address_that_nobody_has_verified_are_limited(database: &Database) {
    // Somebody signs up with the address of somebody else, and changes the password again and again.
    let app = TestApp::start(database, &["--login-limit-per-client=0"]).await;
    sign_up(&app, "ada").await;
    let passwords = [PASSWORD, NEW_PASSWORD];
    let mut tokens = app.log_in("ada").await;
    for round in 0..14 {
        let (current, new) = (passwords[round % 2], passwords[(round + 1) % 2]);
        tokens = app.change_password(&tokens.access_token, current, new).await.expect("a change");
    }
    for _ in 0..10 {
        app.mail_to("ada@example.com", MailKind::PasswordChanged).await;
    }
    app.assert_no_more_mail().await;

    // The owner of a verified address hears of every change.
    app.pass(2.hours());
    let reset = app.request_reset("ada@example.com").await;
    reset.expect("the same answer as always");
    let token = app.token_to("ada@example.com", MailKind::ResetPassword).await;
    app.reset_password(&token, PASSWORD).await.expect("a new password");
    app.mail_to("ada@example.com", MailKind::PasswordChanged).await;
    let mut tokens = app.log_in("ada").await;
    for round in 0..14 {
        let (current, new) = (passwords[round % 2], passwords[(round + 1) % 2]);
        tokens = app.change_password(&tokens.access_token, current, new).await.expect("a change");
        app.mail_to("ada@example.com", MailKind::PasswordChanged).await;
    }
    app.stop().await;
}

async fn a_mail_goes_to_the_stored_address_with_the_configured_link(database: &Database) {
    let arguments = [
        "--issuer=https://issuer.example.com",
        "--public-url=https://auth.example.com/base/",
        "--reset-password-url=https://app.example.com/?a=1&b=2#/reset/{token}",
    ];
    let app = TestApp::start(database, &arguments).await;
    let request = SignUpRequest {
        username: "ada".to_owned(),
        email: "Ada@Example.COM".to_owned(),
        password: PASSWORD.to_owned(),
    };
    app.try_sign_up(request).await.expect("an account");
    let mail = app.mail_to("ada@example.com", MailKind::VerifyEmail).await;
    let link = mail.content.link.expect("a link");
    assert!(link.starts_with("https://auth.example.com/base/verify-email?token="), "{link}");
    assert!(mail.content.text.contains(&link) && mail.content.html.contains(&link));

    // For every name of the service, and for every Host header.
    let origin = "http://evil.example".parse().expect("a URI");
    let endpoint = Endpoint::from_shared(format!("http://{}", app.addresses.grpc)).expect("an address").origin(origin);
    let mut account = AccountServiceClient::new(endpoint.connect_lazy());
    let mut request = Request::new(RequestPasswordResetRequest { email: "ADA@example.com".to_owned() });
    for (name, value) in [
        ("forwarded", "host=evil.example;proto=http"),
        ("x-forwarded-host", "evil.example"),
        ("x-forwarded-proto", "http"),
        ("x-forwarded-prefix", "/evil.example"),
        ("origin", "http://evil.example"),
        ("referer", "http://evil.example/"),
    ] {
        request.metadata_mut().insert(name, value.parse().expect("metadata"));
    }
    account.request_password_reset(request).await.expect("the same answer as always");
    let mail = app.mail_to("ada@example.com", MailKind::ResetPassword).await;
    assert!(!mail.message.contains("evil.example") && !mail.message.contains("auth.example.com"), "{}", mail.message);
    let link = mail.content.link.expect("a link");
    let token = link.strip_prefix("https://app.example.com/?a=1&b=2#/reset/").unwrap_or_else(|| panic!("{link}"));
    assert!(mail.content.text.contains(&link) && mail.content.html.contains(token));
    app.reset_password(token, NEW_PASSWORD).await.expect("the token as it stands in the link");
    app.stop().await;
}

async fn a_sign_up_with_a_taken_address_mails_only_its_owner_where_accounts_are_concealed(database: &Database) {
    let app = TestApp::start(database, &["--conceal-existing-accounts=true"]).await;
    let owner = app.sign_up("ada").await;
    app.mail_to("ada@example.com", MailKind::VerifyEmail).await;
    let request = |username: &str, email: &str| SignUpRequest {
        username: username.to_owned(),
        email: email.to_owned(),
        password: NEW_PASSWORD.to_owned(),
    };
    let taken = app.try_sign_up(request("eve", "ADA@example.com")).await.expect("the same answer as always");
    let taken = taken.user.expect("a user");
    let free = app.try_sign_up(request("eve2", "eve@example.com")).await.expect("an account").user.expect("a user");
    assert_ne!(taken.id, owner.id);
    assert_eq!(taken.id.len(), free.id.len());
    let as_free = postern::proto::User {
        id: free.id.clone(),
        username: free.username.clone(),
        email: free.email.clone(),
        ..taken.clone()
    };
    assert_eq!((as_free, taken.username.as_str(), taken.email.as_str()), (free, "eve", "ada@example.com"));
    let mail = app.mail_to("ada@example.com", MailKind::AccountExists).await;
    assert_eq!(mail.content.link, None);
    app.mail_to("eve@example.com", MailKind::VerifyEmail).await;

    // A taken username may be reported; that reveals nothing about the address.
    for email in ["ada@example.com", "grace@example.com"] {
        let outcome = app.try_sign_up(request("ADA", email)).await;
        assert_fails(outcome, AlreadyExists, "USERNAME_TAKEN");
    }
    let outcome = app.try_log_in("ada@example.com", NEW_PASSWORD).await;
    assert_fails(outcome, Unauthenticated, "INVALID_CREDENTIALS");
    app.log_in("ada").await;
    assert_eq!(database.sql.number("SELECT count(*) FROM users").await, 2);
    app.assert_no_more_mail().await;
    app.stop().await;
}

async fn a_change_to_a_taken_address_mails_only_its_owner_where_accounts_are_concealed(database: &Database) {
    let app = TestApp::start(database, &["--conceal-existing-accounts=true"]).await;
    sign_up(&app, "ada").await;
    database.sql.execute("UPDATE users SET email_verified = true WHERE username = 'ada'").await;
    sign_up(&app, "eve").await;
    let eve = app.log_in("eve").await.access_token;
    for (address, kind) in
        [("ada@example.com", MailKind::AccountExists), ("free@example.com", MailKind::ConfirmEmailChange)]
    {
        app.request_email_change(&eve, address).await.expect("the same answer as always");
        app.mail_to(address, kind).await;
        let notice = app.mail_to("eve@example.com", MailKind::EmailChangeRequested).await;
        let spelled_out = address.replace('.', " (dot) ").replace('@', " (at) ");
        assert!(notice.content.text.contains(&spelled_out), "{}", notice.content.text);
    }
    // The limit is the same too: a taken address gets as many mails as a free one.
    for address in ["ada@example.com", "free@example.com"] {
        for number in 0..12 {
            let outcome = app.request_email_change(&eve, address).await;
            let had = if address == "ada@example.com" { 2 } else { 1 };
            assert_eq!(outcome.is_ok(), number + had < 10, "{address}, number {number}: {outcome:?}");
        }
    }
    app.stop().await;
}

async fn without_concealment_the_owner_of_a_taken_address_is_not_mailed(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    sign_up(&app, "ada").await;
    database.sql.execute("UPDATE users SET email_verified = true WHERE username = 'ada'").await;
    sign_up(&app, "eve").await;
    let request = SignUpRequest {
        username: "mallory".to_owned(),
        email: "ada@example.com".to_owned(),
        password: PASSWORD.to_owned(),
    };
    assert_fails(app.try_sign_up(request).await, AlreadyExists, "EMAIL_TAKEN");
    let eve = app.log_in("eve").await.access_token;
    assert_fails(app.request_email_change(&eve, "ada@example.com").await, AlreadyExists, "EMAIL_TAKEN");
    app.assert_no_more_mail().await;
    app.stop().await;
}
