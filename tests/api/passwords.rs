//! Passwords across the whole service: the rules for a new one, old hashes, and overload of the hasher.

use std::time::Duration;

use futures_util::future::{join, join_all};
use postern::proto::SignUpRequest;
use tonic::Code::{Internal, InvalidArgument, ResourceExhausted, Unauthenticated};

use crate::{
    app::{NEW_PASSWORD, PASSWORD, TestApp, assert_fails},
    support::{Database, Engine, on_each_engine, with_database},
};

on_each_engine![
    a_login_with_an_old_hash_renews_it_and_a_wrong_password_does_not,
    a_malformed_or_too_expensive_stored_hash_is_an_internal_error,
    both_unicode_forms_of_a_password_log_in_and_a_look_alike_does_not,
    of_two_concurrent_password_changes_one_succeeds,
];

const HASH: &str = "SELECT password_hash FROM users";

async fn a_login_with_an_old_hash_renews_it_and_a_wrong_password_does_not(database: &Database) {
    let app = TestApp::start(database, &["--argon2-memory-kib=32", "--argon2-iterations=3"]).await;
    app.sign_up("ada").await;
    let old = database.sql.text(HASH).await;
    assert!(old.starts_with("$argon2id$v=19$m=32,t=3,p=1$"), "{old}");

    let app = app.restart(&["--argon2-memory-kib=64", "--argon2-iterations=1"]).await;
    let wrong = app.try_log_in("ada@example.com", "correct horse battery stapler").await;
    assert_fails(wrong, Unauthenticated, "INVALID_CREDENTIALS");
    assert_eq!(database.sql.text(HASH).await, old);

    let tokens = app.log_in("ada").await;
    let renewed = database.sql.text(HASH).await;
    assert!(renewed.starts_with("$argon2id$v=19$m=64,t=1,p=1$"), "{renewed}");
    assert_eq!(database.sql.number("SELECT password_version FROM users").await, 0, "a new hash is not a new password");
    app.refresh(&tokens.refresh_token).await.expect("a session like any other");

    app.log_in("ada").await;
    assert_eq!(database.sql.text(HASH).await, renewed, "it is not renewed again");
    let wrong = app.try_log_in("ada@example.com", "correct horse battery stapler").await;
    assert_fails(wrong, Unauthenticated, "INVALID_CREDENTIALS");
    app.stop().await;
}

async fn a_malformed_or_too_expensive_stored_hash_is_an_internal_error(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    app.sign_up("ada").await;
    let good = database.sql.text(HASH).await;
    let before = largest_size();
    for bad in [
        good.replace("m=64", "m=4194304"),
        good.replace("m=64", "m=65537"),
        good.replace("t=1", "t=17"),
        good.replace("t=1", "t=4294967295"),
        good.replace("p=1", "p=17"),
        good.replace("argon2id", "argon2i"),
        good.replace("v=19", "v=16"),
        good.replace("v=19$", ""),
        good.replace("m=64", "m=0"),
        "$2b$12$abcdefghijklmnopqrstuuK1QbIhUiVhyhGLPRUqSMKBWRNLaAJJW".to_owned(),
        good[..good.len() - 8].to_owned(),
        PASSWORD.to_owned(),
        String::new(),
    ] {
        assert_ne!(bad, good, "the replaced text was not found");
        database.sql.execute(&format!("UPDATE users SET password_hash = '{bad}'")).await;
        for password in [PASSWORD, "correct horse battery stapler"] {
            let outcome = app.try_log_in("ada@example.com", password).await;
            let failure = assert_fails(outcome, Internal, "");
            assert_eq!(failure.message, "internal error", "{bad}");
        }
        assert_eq!(database.sql.text(HASH).await, bad, "the stored hash is not changed");
    }
    let grown = largest_size() - before;
    assert!(grown < 1024 * 1024, "the process grew by {grown} KiB; one of the hashes asked for 4 GiB");

    database.sql.execute(&format!("UPDATE users SET password_hash = '{good}'")).await;
    app.log_in("ada").await;
    app.stop().await;
}

/// The peak size of this process in KiB, including memory that it never touched.
fn largest_size() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:")).expect("a peak");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

async fn both_unicode_forms_of_a_password_log_in_and_a_look_alike_does_not(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    let request = SignUpRequest {
        username: "ada".to_owned(),
        email: "ada@example.com".to_owned(),
        password: "caf\u{e9} fishing tr\u{fc}mmer".to_owned(),
    };
    app.try_sign_up(request).await.expect("an account");
    let either_way = app.try_log_in("ada@example.com", "cafe\u{301} fishing\u{a0}tru\u{308}mmer").await;
    either_way.expect("the same password");
    for other in ["cafe fishing trummer", "caf\u{e9} \u{fb01}shing tr\u{fc}mmer", "Caf\u{e9} fishing tr\u{fc}mmer"] {
        let outcome = app.try_log_in("ada@example.com", other).await;
        assert_fails(outcome, Unauthenticated, "INVALID_CREDENTIALS");
    }
    app.stop().await;
}

async fn of_two_concurrent_password_changes_one_succeeds(database: &Database) {
    // Hashing takes long enough for the two to overlap.
    let app = TestApp::start(database, &["--argon2-memory-kib=4096", "--hash-threads=2"]).await;
    app.sign_up("ada").await;
    let mut current = PASSWORD.to_owned();
    for round in 0..6 {
        let log_in = async || {
            let reply = app.try_log_in("ada@example.com", &current).await.expect("a session");
            reply.tokens.expect("tokens")
        };
        let sessions = [log_in().await, log_in().await];
        let passwords = [0, 1].map(|side| format!("{NEW_PASSWORD}, {round}-{side}"));
        let change = |side: usize| app.change_password(&sessions[side].access_token, &current, &passwords[side]);
        let (winner, tokens, loser) = match join(change(0), change(1)).await {
            (Ok(tokens), Err(loser)) => (0, tokens, loser),
            (Err(loser), Ok(tokens)) => (1, tokens, loser),
            other => panic!("round {round}: {other:?}"),
        };
        assert_eq!(loser.code, Unauthenticated);
        assert!(["INVALID_CREDENTIALS", "SESSION_REVOKED"].contains(&loser.reason.as_str()), "{loser:?}");
        for before in &sessions {
            app.assert_session_over(before).await;
        }
        app.me(&tokens.access_token).await.expect("the winner's session");
        let live = database.sql.number("SELECT count(*) FROM sessions WHERE revoke_time IS NULL").await;
        assert_eq!(live, 1, "round {round}");
        current.clone_from(&passwords[winner]);
    }
    app.stop().await;
}

#[tokio::test]
async fn a_new_password_is_checked_against_the_accounts_words_and_the_configured_limits() {
    with_database(Engine::Sqlite, async |database| {
        let app = TestApp::start(database, &["--password-min-length=10", "--password-min-score=2"]).await;
        let sign_up = async |username: &str, email: &str, password: &str| {
            let (username, email, password) = (username.to_owned(), email.to_owned(), password.to_owned());
            app.try_sign_up(SignUpRequest { username, email, password }).await.map(drop)
        };
        for (username, email, password) in [
            ("wolframite", "ada@example.com", "wolframite77"),
            ("ada", "wolframite@example.com", "wolframite77"),
            ("ada", "ada@wolframite.example", "wolframite77"),
            ("ada", "ada@example.com", "postern2030"),
            ("ada", "ada@example.com", "password1234"),
            ("ada", "ada@example.com", "x7$Kq!v9b"),
            ("ada", "ada@example.com", &"a1".repeat(513)),
        ] {
            let failure = assert_fails(sign_up(username, email, password).await, InvalidArgument, "INVALID_FIELD");
            assert_eq!(failure.fields, ["password"], "{password}");
            assert!(failure.message.starts_with("password "), "{}", failure.message);
            assert!(!failure.message.contains(password), "{}", failure.message);
        }
        sign_up("ada", "ada@example.com", "wolframite77").await.expect("the words of another account do not count");
        sign_up("grace", "grace@example.com", "x7$Kq!v9bz").await.expect("long enough");
        app.abandon();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_hash_queue_refuses_with_a_retry_delay() {
    with_database(Engine::Sqlite, async |database| {
        let arguments = ["--hash-threads=1", "--hash-queue=1", "--argon2-memory-kib=19456", "--argon2-iterations=2"];
        let app = TestApp::start(database, &arguments).await;
        // Far more at once than are hashed in a second: one is hashed, one waits, some get a place within a second, and the
        // others are refused. One hash is short, so that those with a place keep their deadline on a slow machine too.
        let logins = (0..300).map(|number| {
            let email = format!("nobody-{number}@example.com");
            let app = &app;
            async move { app.try_log_in(&email, PASSWORD).await.expect_err("there is no such account") }
        });
        let (overloaded, checked): (Vec<_>, Vec<_>) =
            join_all(logins).await.into_iter().partition(|failure| failure.code == ResourceExhausted);
        assert!(!overloaded.is_empty() && checked.len() >= 2, "{} overloaded", overloaded.len());
        for failure in overloaded {
            assert_eq!(failure.reason, "OVERLOADED");
            let delay = failure.retry_delay.expect("a time to come back");
            assert!((Duration::from_millis(100)..Duration::from_mins(1)).contains(&delay), "{delay:?}");
        }
        for failure in checked {
            assert_eq!((failure.code, failure.reason.as_str()), (Unauthenticated, "INVALID_CREDENTIALS"));
        }
        // There is room again.
        let outcome = app.try_log_in("nobody@example.com", PASSWORD).await;
        assert_fails(outcome, Unauthenticated, "INVALID_CREDENTIALS");
        app.abandon();
    })
    .await;
}
