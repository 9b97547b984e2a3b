//! Password attempts: how many are reserved, the lockouts after that, and when attempts no longer count.

use std::{sync::Arc, time::Duration};

use postern::domain::{
    ports::{
        ATTEMPT_LIFETIME, LoginAttempt, NewSession, PasswordReset, PasswordResetOutcome, Reservation, SessionOpening,
        Store,
    },
    throttle::{AttemptPolicy, AttemptSubject},
};
use time::ext::NumericalDuration as _;

use crate::{
    fixtures::{NOW, audit_context, new_session, reset_by, sign_up_without_mail, subject, token},
    parallel::all_at_once,
    support::{Database, Engine, on_each_engine, with_database},
};

on_each_engine![
    five_hundred_concurrent_attempts_reserve_only_the_allowed_number,
    each_lockout_is_twice_as_long_up_to_the_longest,
    a_policy_of_one_attempt_locks_out_after_the_first,
    blocked_attempts_do_not_count,
    an_abandoned_attempt_frees_its_place_for_another,
    attempts_under_way_and_failures_together_stay_within_the_limit,
    after_a_lockout_one_attempt_is_made_at_a_time,
    attempts_that_nobody_settles_are_forgotten,
    a_successful_attempt_resets_the_earlier_ones,
    a_login_resets_the_attempts_and_a_refused_login_does_not,
    a_password_reset_resets_the_attempts_and_a_dead_token_does_not,
    each_subject_is_counted_separately,
    attempts_no_longer_count_after_a_window_without_any,
    attempts_are_purged_once_they_no_longer_count,
    attempts_that_a_clock_wrote_which_was_ahead_hold_nobody_up,
];

pub const POLICY: AttemptPolicy = AttemptPolicy {
    max_failures: 10,
    first_delay: Duration::from_secs(30),
    longest_delay: Duration::from_mins(15),
    window: Duration::from_hours(1),
};
/// On PostgreSQL the database's clock decides, and it runs while the test runs.
const TOLERANCE: Duration = Duration::from_secs(20);

pub fn attempt(subject: AttemptSubject) -> LoginAttempt {
    LoginAttempt { subject, policy: POLICY, now: NOW }
}

async fn reserve(store: &dyn Store, attempt: LoginAttempt) -> Reservation {
    store.reserve_attempt(attempt).await.expect("the store")
}

async fn is_reserved(store: &dyn Store, attempt: LoginAttempt) -> bool {
    reserve(store, attempt).await == Reservation::Reserved
}

/// Makes an attempt that fails, if one is reserved.
async fn fails(store: &dyn Store, attempt: LoginAttempt) -> bool {
    let reserved = is_reserved(store, attempt).await;
    if reserved {
        store.attempt_failed(attempt, None, audit_context()).await.expect("the store");
    }
    reserved
}

/// Makes attempts that fail until one is blocked. Returns how many were made.
async fn attempts_until_blocked(store: &dyn Store, attempt: LoginAttempt) -> i64 {
    for count in 0..1_000 {
        if !fails(store, attempt).await {
            return count;
        }
    }
    panic!("no attempt is blocked");
}

/// Reserves attempts, and settles none of them, until no more are reserved. Returns how many were.
async fn attempts_until_busy(store: &dyn Store, attempt: LoginAttempt) -> i64 {
    for count in 0..1_000 {
        match reserve(store, attempt).await {
            Reservation::Reserved => {}
            Reservation::Busy => return count,
            blocked @ Reservation::Blocked { .. } => panic!("{blocked:?}"),
        }
    }
    panic!("any number of attempts may be under way");
}

/// Asserts the remaining lockout. On PostgreSQL a part of it has already passed.
async fn assert_lockout(store: &dyn Store, attempt: LoginAttempt, expected: Duration) {
    let Reservation::Blocked { retry_after } = reserve(store, attempt).await else {
        panic!("the attempt is not blocked; expected a lockout of {expected:?}");
    };
    assert!(retry_after <= expected && retry_after + TOLERANCE > expected, "{retry_after:?}, expected {expected:?}");
}

async fn five_hundred_concurrent_attempts_reserve_only_the_allowed_number(database: &Database) {
    let first = database.store().await;
    let stores = match database.engine {
        Engine::Sqlite => [Arc::clone(&first), Arc::clone(&first), first],
        Engine::Postgres => [first, database.store().await, database.store().await],
    };
    for max_failures in [10, 1] {
        let subject = subject(&format!("{max_failures}@example.com"));
        let policy = AttemptPolicy { max_failures, ..POLICY };
        let reservations = (0..500).map(|number| {
            let store = Arc::clone(&stores[number % 3]);
            let attempt = LoginAttempt { policy, ..attempt(subject) };
            async move { reserve(store.as_ref(), attempt).await }
        });
        let mut reserved = 0;
        for reservation in all_at_once(reservations).await {
            match reservation {
                Reservation::Reserved => reserved += 1,
                Reservation::Busy => {}
                blocked @ Reservation::Blocked { .. } => panic!("nothing has failed yet: {blocked:?}"),
            }
        }
        assert_eq!(reserved, max_failures);
        let attempt = LoginAttempt { policy, ..attempt(subject) };
        for _ in 0..max_failures {
            stores[0].attempt_failed(attempt, None, audit_context()).await.expect("the store");
        }
        assert_lockout(stores[0].as_ref(), attempt, POLICY.first_delay).await;
    }
}

async fn each_lockout_is_twice_as_long_up_to_the_longest(database: &Database) {
    let store = database.store().await;
    let attempt = attempt(subject("ada@example.com"));
    assert_eq!(attempts_until_blocked(store.as_ref(), attempt).await, POLICY.max_failures);
    for seconds in [30, 60, 120, 240, 480, 900, 900, 900] {
        let lockout = Duration::from_secs(seconds);
        assert_lockout(store.as_ref(), attempt, lockout).await;
        database.age_attempts(lockout.saturating_sub(TOLERANCE)).await;
        assert!(!is_reserved(store.as_ref(), attempt).await, "the lockout of {lockout:?} is not over");
        database.age_attempts(TOLERANCE).await;
        assert!(fails(store.as_ref(), attempt).await, "the lockout of {lockout:?} is over");
    }
}

async fn a_policy_of_one_attempt_locks_out_after_the_first(database: &Database) {
    let store = database.store().await;
    let policy = AttemptPolicy { max_failures: 1, ..POLICY };
    let attempt = LoginAttempt { policy, ..attempt(subject("ada@example.com")) };
    for round in ["the first", "the first after a window"] {
        assert!(fails(store.as_ref(), attempt).await, "{round}");
        assert_lockout(store.as_ref(), attempt, POLICY.first_delay).await;
        database.age_attempts(POLICY.first_delay).await;
        assert!(fails(store.as_ref(), attempt).await, "{round}");
        assert_lockout(store.as_ref(), attempt, 2 * POLICY.first_delay).await;
        database.age_attempts(POLICY.window).await;
    }
}

async fn blocked_attempts_do_not_count(database: &Database) {
    let store = database.store().await;
    let attempt = attempt(subject("ada@example.com"));
    attempts_until_blocked(store.as_ref(), attempt).await;
    for _ in 0..20 {
        assert!(!is_reserved(store.as_ref(), attempt).await);
    }
    database.age_attempts(POLICY.first_delay).await;
    assert!(fails(store.as_ref(), attempt).await);
    assert_lockout(store.as_ref(), attempt, 2 * POLICY.first_delay).await;
}

async fn an_abandoned_attempt_frees_its_place_for_another(database: &Database) {
    let store = database.store().await;
    let (attempt, other) = (attempt(subject("ada@example.com")), attempt(subject("grace@example.com")));
    assert_eq!(attempts_until_busy(store.as_ref(), attempt).await, 10);
    for _ in 0..3 {
        store.attempt_abandoned(attempt.subject).await.expect("the store");
        assert_eq!(attempts_until_busy(store.as_ref(), attempt).await, 1);
    }

    store.attempt_abandoned(other.subject).await.expect("the store");
    assert_eq!(attempts_until_busy(store.as_ref(), other).await, 10, "the count does not go below zero");
}

async fn attempts_under_way_and_failures_together_stay_within_the_limit(database: &Database) {
    let store = database.store().await;
    let attempt = attempt(subject("ada@example.com"));
    for _ in 0..6 {
        assert!(fails(store.as_ref(), attempt).await);
    }
    assert_eq!(attempts_until_busy(store.as_ref(), attempt).await, 4);
    // One of them fails. Seven failures and three attempts under way reach the limit.
    store.attempt_failed(attempt, None, audit_context()).await.expect("the store");
    assert_eq!(reserve(store.as_ref(), attempt).await, Reservation::Busy);
    // One succeeds, which resets the failures. Two are still under way.
    store.attempt_succeeded(attempt.subject).await.expect("the store");
    assert_eq!(attempts_until_busy(store.as_ref(), attempt).await, 8);
}

async fn after_a_lockout_one_attempt_is_made_at_a_time(database: &Database) {
    let store = database.store().await;
    let attempt = attempt(subject("ada@example.com"));
    attempts_until_blocked(store.as_ref(), attempt).await;
    database.age_attempts(POLICY.first_delay).await;
    assert_eq!(attempts_until_busy(store.as_ref(), attempt).await, 1);
    store.attempt_failed(attempt, None, audit_context()).await.expect("the store");
    assert_lockout(store.as_ref(), attempt, 2 * POLICY.first_delay).await;
}

async fn attempts_that_nobody_settles_are_forgotten(database: &Database) {
    let store = database.store().await;
    let attempt = attempt(subject("ada@example.com"));
    for _ in 0..3 {
        assert!(fails(store.as_ref(), attempt).await);
    }
    assert_eq!(attempts_until_busy(store.as_ref(), attempt).await, 7);
    database.age_attempts(ATTEMPT_LIFETIME).await;
    assert_eq!(attempts_until_busy(store.as_ref(), attempt).await, 7, "the failures still count");
}

async fn a_successful_attempt_resets_the_earlier_ones(database: &Database) {
    let store = database.store().await;
    let attempt = attempt(subject("ada@example.com"));
    for _ in 0..9 {
        assert!(fails(store.as_ref(), attempt).await);
    }
    assert!(is_reserved(store.as_ref(), attempt).await);
    store.attempt_succeeded(attempt.subject).await.expect("the store");
    assert_eq!(attempts_until_blocked(store.as_ref(), attempt).await, POLICY.max_failures);
    store.attempt_succeeded(attempt.subject).await.expect("the store");
    assert_eq!(attempts_until_blocked(store.as_ref(), attempt).await, POLICY.max_failures);
}

async fn a_login_resets_the_attempts_and_a_refused_login_does_not(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let attempt = attempt(subject("ada@example.com"));
    attempts_until_blocked(store.as_ref(), attempt).await;
    let login = |attempt, password_version| NewSession { attempt, password_version, ..new_session(user.id) };
    for refused in [login(Some(attempt.subject), 7), login(None, 0)] {
        store.open_session(refused).await.expect("the store");
        assert!(!is_reserved(store.as_ref(), attempt).await);
    }
    let opening = store.open_session(login(Some(attempt.subject), 0)).await.expect("the store");
    assert_eq!(opening, SessionOpening::Opened(user));
    assert_eq!(attempts_until_blocked(store.as_ref(), attempt).await, POLICY.max_failures);
}

async fn a_password_reset_resets_the_attempts_and_a_dead_token_does_not(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let attempt = attempt(subject("ada@example.com"));
    attempts_until_blocked(store.as_ref(), attempt).await;
    let reset = reset_by(token(store.as_ref(), &user, postern::domain::one_time::Purpose::ResetPassword).await);
    assert_eq!(reset.attempts, attempt.subject);
    let expired = PasswordReset { context: crate::fixtures::audit_context_at(NOW + 1.hours()), ..reset.clone() };
    let outcome = store.reset_password(expired).await.expect("the store");
    assert_eq!(outcome, PasswordResetOutcome::TokenDead);
    assert!(!is_reserved(store.as_ref(), attempt).await);
    assert_eq!(store.reset_password(reset).await.expect("the store"), PasswordResetOutcome::Reset);
    assert_eq!(attempts_until_blocked(store.as_ref(), attempt).await, POLICY.max_failures);
}

async fn each_subject_is_counted_separately(database: &Database) {
    let store = database.store().await;
    let [one, another] = [attempt(subject("ada@example.com")), attempt(subject("grace@example.com"))];
    attempts_until_blocked(store.as_ref(), one).await;
    for _ in 0..5 {
        assert!(fails(store.as_ref(), another).await);
    }
    store.attempt_succeeded(another.subject).await.expect("the store");
    assert!(!is_reserved(store.as_ref(), one).await);
    assert_eq!(attempts_until_blocked(store.as_ref(), another).await, POLICY.max_failures);
}

async fn attempts_no_longer_count_after_a_window_without_any(database: &Database) {
    let store = database.store().await;
    let attempt = attempt(subject("ada@example.com"));
    for _ in 0..5 {
        assert!(fails(store.as_ref(), attempt).await);
        // Each attempt restarts the window.
        database.age_attempts(POLICY.window.saturating_sub(TOLERANCE)).await;
    }
    assert_eq!(
        attempts_until_blocked(store.as_ref(), attempt).await,
        POLICY.max_failures - 5,
        "the attempts still count"
    );
    database.age_attempts(POLICY.window).await;
    assert_eq!(attempts_until_blocked(store.as_ref(), attempt).await, POLICY.max_failures);
    assert_lockout(store.as_ref(), attempt, POLICY.first_delay).await;
}

async fn attempts_are_purged_once_they_no_longer_count(database: &Database) {
    let store = database.store().await;
    for name in ["ada@example.com", "grace@example.com"] {
        assert!(fails(store.as_ref(), attempt(subject(name))).await);
        database.age_attempts(POLICY.window / 2).await;
    }
    let counted = async || database.sql.number("SELECT count(*) FROM login_attempts").await;
    store.purge_attempts(NOW, None, 100).await.expect("the store");
    database.age_attempts(TOLERANCE).await;
    assert_eq!(
        counted().await,
        1 + i64::from(database.engine == Engine::Sqlite),
        "an attempt still counts at the end of its window"
    );
    store.purge_attempts(NOW, None, 100).await.expect("the store");
    assert_eq!(counted().await, 1);
    database.age_attempts(POLICY.window).await;
    store.purge_attempts(NOW, None, 100).await.expect("the store");
    assert_eq!(counted().await, 0);
}

async fn attempts_that_a_clock_wrote_which_was_ahead_hold_nobody_up(database: &Database) {
    let store = database.store().await;
    for days in [1, 10] {
        for (number, until_refused) in [true, false].into_iter().enumerate() {
            let attempt = attempt(subject(&format!("ada-{days}-{number}@example.com")));
            if until_refused {
                attempts_until_blocked(store.as_ref(), attempt).await;
            } else {
                attempts_until_busy(store.as_ref(), attempt).await;
            }
            assert!(!is_reserved(store.as_ref(), attempt).await);
            database.postpone_attempts(Duration::from_hours(24 * days)).await;
            assert_eq!(attempts_until_blocked(store.as_ref(), attempt).await, POLICY.max_failures);
            assert_lockout(store.as_ref(), attempt, POLICY.first_delay).await;
        }
    }
}

/// A replica whose clock is ahead must not allow more attempts by purging earlier ones.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_postgres_attempts_are_purged_by_the_databases_clock() {
    with_database(Engine::Postgres, async |database| {
        let store = database.store().await;
        let attempt = attempt(subject("ada@example.com"));
        attempts_until_blocked(store.as_ref(), attempt).await;
        store.purge_attempts(NOW + 10_000.days(), None, 100).await.expect("the store");
        assert!(!is_reserved(store.as_ref(), attempt).await);
        let attempt_later = LoginAttempt { now: NOW + 10_000.days(), ..attempt };
        assert!(!is_reserved(store.as_ref(), attempt_later).await, "such a clock does not end a lockout either");
    })
    .await;
}
