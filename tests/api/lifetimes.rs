//! Lifetimes, tested with a clock that the test moves.

use postern::proto::TokenPair;
use time::{OffsetDateTime, ext::NumericalDuration as _};
use tonic::Code::Unauthenticated;

use crate::{
    app::{START, TestApp, assert_fails},
    support::{Database, on_each_engine, wait_until},
};

on_each_engine![
    an_access_token_lives_fifteen_minutes_and_five_seconds_of_leeway,
    a_refresh_token_lives_seven_days,
    a_session_ends_after_ninety_days_even_if_it_is_refreshed,
    a_session_past_its_end_is_purged,
];

fn access_expiry(tokens: &TokenPair) -> OffsetDateTime {
    whole(tokens.access_token_expire_time)
}

fn refresh_expiry(tokens: &TokenPair) -> OffsetDateTime {
    whole(tokens.refresh_token_expire_time)
}

fn whole(timestamp: Option<prost_types::Timestamp>) -> OffsetDateTime {
    let timestamp = timestamp.expect("a time");
    assert_eq!(timestamp.nanos, 0, "the expiry of a token is in whole seconds");
    OffsetDateTime::from_unix_timestamp(timestamp.seconds).expect("a time")
}

/// The time, rounded down to whole seconds.
fn second_of(moment: OffsetDateTime) -> OffsetDateTime {
    moment.replace_nanosecond(0).expect("a whole second")
}

async fn an_access_token_lives_fifteen_minutes_and_five_seconds_of_leeway(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    app.sign_up("ada").await;
    let tokens = app.log_in("ada").await;
    assert_eq!(access_expiry(&tokens), second_of(START) + 15.minutes());

    app.pass(15.minutes() + 4.seconds());
    app.me(&tokens.access_token).await.expect("still within the leeway");
    app.pass(1.seconds());
    assert_fails(app.me(&tokens.access_token).await, Unauthenticated, "TOKEN_EXPIRED");

    let next = app.refresh(&tokens.refresh_token).await.expect("the next tokens");
    assert_eq!(access_expiry(&next), second_of(START) + 30.minutes() + 5.seconds());
    app.me(&next.access_token).await.expect("a fresh token");
    app.stop().await;
}

async fn a_refresh_token_lives_seven_days(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    app.sign_up("ada").await;
    let (first, idle) = (app.log_in("ada").await, app.log_in("ada").await);
    assert_eq!(refresh_expiry(&first), second_of(START) + 7.days());

    app.pass(7.days() - 1.seconds());
    let second = app.refresh(&first.refresh_token).await.expect("a second before the end");
    assert_eq!(refresh_expiry(&second), second_of(START) + 14.days() - 1.seconds());
    app.pass(1.seconds());
    assert_fails(app.refresh(&idle.refresh_token).await, Unauthenticated, "REFRESH_TOKEN_INVALID");
    app.refresh(&second.refresh_token).await.expect("the one that went on");
    app.stop().await;
}

async fn a_session_ends_after_ninety_days_even_if_it_is_refreshed(database: &Database) {
    let app = TestApp::start(database, &[]).await;
    app.sign_up("ada").await;
    let mut tokens = app.log_in("ada").await;
    let end = second_of(START) + 90.days();
    for day in (6_i64..90).step_by(6) {
        app.pass(6.days());
        tokens = app.refresh(&tokens.refresh_token).await.unwrap_or_else(|failure| panic!("day {day}: {failure:?}"));
        let expected = (second_of(START) + (day + 7).days()).min(end);
        assert_eq!(refresh_expiry(&tokens), expected, "day {day}");
    }
    assert_eq!(refresh_expiry(&tokens), end);
    app.pass(6.days() - 1.seconds());
    tokens = app.refresh(&tokens.refresh_token).await.expect("a second before the end");
    assert_eq!(refresh_expiry(&tokens), end);
    app.pass(1.seconds());
    assert_fails(app.refresh(&tokens.refresh_token).await, Unauthenticated, "REFRESH_TOKEN_INVALID");
    app.stop().await;
}

async fn a_session_past_its_end_is_purged(database: &Database) {
    let app = TestApp::start(database, &["--session-max-lifetime=30d"]).await;
    app.sign_up("ada").await;
    let older = app.log_in("ada").await;
    app.pass(20.days());
    let newer = app.log_in("ada").await;
    app.pass(11.days());
    // The purge runs at the start, and then every hour.
    let app = app.restart(&[]).await;
    wait_until("a session is gone", async || {
        (database.sql.number("SELECT count(*) FROM sessions").await == 1).then_some(())
    })
    .await;
    assert_fails(app.log_out(&older.refresh_token).await, Unauthenticated, "REFRESH_TOKEN_INVALID");
    app.log_out(&newer.refresh_token).await.expect("the one that is not past its end");
    app.stop().await;
}
