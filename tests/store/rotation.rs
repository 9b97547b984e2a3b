//! Refreshing: what a presented token is to its session, and what becomes of both.

use std::time::Duration;

use postern::domain::{
    ids::{SessionId, UserId},
    ports::{Rotation, RotationOutcome, Store},
    session::RefreshHash,
};
use time::ext::NumericalDuration as _;

use crate::{
    fixtures::{
        ISSUED, Token, WINDOW, audit_context, audit_context_at, is_alive, log_in, log_out, new_id, refresh, sign_up,
    },
    support::{Database, Engine, on_each_engine},
};

on_each_engine![
    a_live_token_is_exchanged_for_the_next_one,
    roles_are_read_anew_at_every_exchange,
    a_session_can_be_exchanged_many_times,
    a_retry_in_time_is_given_the_same_token_and_changes_nothing,
    a_retry_is_in_time_up_to_the_window_and_not_after,
    the_window_opens_with_the_last_exchange_and_not_with_the_session,
    with_no_window_a_retry_is_a_reuse,
    an_older_token_is_a_reuse_and_ends_the_session,
    another_token_of_the_live_generation_is_a_reuse_and_ends_the_session,
    a_token_from_the_future_is_dead_and_changes_nothing,
    an_unknown_session_is_dead,
    somebody_elses_session_is_dead_and_unchanged,
    a_revoked_session_is_dead_and_unchanged,
    an_expired_token_is_dead_and_unchanged,
    the_session_of_a_disabled_user_is_dead_and_unchanged,
];

async fn rotate(store: &dyn Store, rotation: Rotation) -> RotationOutcome {
    store.rotate_refresh(rotation).await.expect("the store")
}

/// Ada's session, her token, and the one that she had before.
async fn refreshed_once(store: &dyn Store) -> (Token, Token) {
    let user = sign_up(store, "ada").await;
    let first = log_in(store, &user).await;
    let second = refresh(store, &first).await;
    (first, second)
}

/// Presents what is dead, and sees that it stays as it is.
async fn assert_dead(database: &Database, store: &dyn Store, token: &Token, rotation: Rotation) {
    let before = database.session_row(token).await;
    assert_eq!(rotate(store, rotation).await, RotationOutcome::Invalid);
    assert_eq!(database.session_row(token).await, before);
}

/// Presents what was used up, and sees that the session is over, for those that hold its live token too.
async fn assert_reuse(database: &Database, store: &dyn Store, live: &Token, rotation: Rotation) {
    assert!(is_alive(store, live).await);
    assert_eq!(rotate(store, rotation.clone()).await, RotationOutcome::Reused);
    assert!(database.is_revoked(live).await);
    assert!(!is_alive(store, live).await);
    assert_eq!(rotate(store, live.rotation()).await, RotationOutcome::Invalid);
    assert_eq!(rotate(store, rotation).await, RotationOutcome::Invalid, "again");
}

async fn a_live_token_is_exchanged_for_the_next_one(database: &Database) {
    let store = database.store().await;
    let user = sign_up(store.as_ref(), "ada").await;
    let other = log_in(store.as_ref(), &user).await;
    let unchanged = database.session_row(&other).await;
    let first = log_in(store.as_ref(), &user).await;
    let second = first.successor("");

    assert_eq!(rotate(store.as_ref(), first.replaced_by(&second)).await, RotationOutcome::Rotated(user));
    assert_eq!(database.sessions_where("generation = 1 AND revoke_time IS NULL").await, 1);
    assert_eq!(database.session_row(&other).await, unchanged, "another session of the user");
    refresh(store.as_ref(), &second).await;
}

async fn roles_are_read_anew_at_every_exchange(database: &Database) {
    let store = database.store().await;
    let user = sign_up(store.as_ref(), "ada").await;
    let token = log_in(store.as_ref(), &user).await;
    database.set_user(user.id, "email_verified = true").await;

    for (attempt, role) in [("the exchange", "admin"), ("the retry", "billing")] {
        database.add_role(user.id, role).await;
        let (RotationOutcome::Rotated(found) | RotationOutcome::Replayed { user: found, .. }) =
            rotate(store.as_ref(), token.rotation()).await
        else {
            panic!("{attempt} failed");
        };
        assert!(found.roles.iter().any(|found| found.as_str() == role), "{attempt}: {:?}", found.roles);
        assert!(found.email_verified, "{attempt}");
    }
}

async fn a_session_can_be_exchanged_many_times(database: &Database) {
    let store = database.store().await;
    let user = sign_up(store.as_ref(), "ada").await;
    let mut token = log_in(store.as_ref(), &user).await;
    for _ in 0..20 {
        token = refresh(store.as_ref(), &token).await;
    }
    assert_eq!(token.grant.generation, 20);
    assert_eq!(database.sessions_where("generation = 20").await, 1);
}

async fn a_retry_in_time_is_given_the_same_token_and_changes_nothing(database: &Database) {
    let store = database.store().await;
    let (first, second) = refreshed_once(store.as_ref()).await;
    let before = database.session_row(&second).await;

    // What a retry would have minted, a second later.
    let mut elsewhere = first.successor("a second later");
    elsewhere.grant.issue_time += 1.seconds();
    elsewhere.grant.expire_time += 1.seconds();
    for _ in 0..3 {
        let RotationOutcome::Replayed { grant, hash, user } =
            rotate(store.as_ref(), first.replaced_by(&elsewhere)).await
        else {
            panic!("no retry");
        };
        assert_eq!(Token { grant, hash }, second);
        assert_eq!(user.id, second.grant.user_id);
    }
    assert_eq!(database.session_row(&second).await, before);
    refresh(store.as_ref(), &second).await;
}

async fn a_retry_is_in_time_up_to_the_window_and_not_after(database: &Database) {
    let store = database.store().await;
    let (first, second) = refreshed_once(store.as_ref()).await;

    let presented = Rotation { retry_window: Duration::from_mins(1), ..first.rotation() };

    // PostgreSQL's clock runs meanwhile, so there it is not asked to the microsecond.
    let (in_time, more) = match database.engine {
        Engine::Sqlite => (Duration::from_mins(1), Duration::from_micros(1)),
        Engine::Postgres => (Duration::from_secs(30), Duration::from_secs(31)),
    };
    database.age_rotation(&second, in_time).await;
    let outcome = rotate(store.as_ref(), presented.clone()).await;
    assert!(matches!(outcome, RotationOutcome::Replayed { .. }), "{outcome:?}");
    database.age_rotation(&second, more).await;
    assert_reuse(database, store.as_ref(), &second, presented).await;
}

async fn the_window_opens_with_the_last_exchange_and_not_with_the_session(database: &Database) {
    let store = database.store().await;
    let (first, second) = refreshed_once(store.as_ref()).await;
    database.age_rotation(&second, 2 * WINDOW).await;
    let third = refresh(store.as_ref(), &second).await;
    let outcome = rotate(store.as_ref(), second.rotation()).await;
    assert!(matches!(outcome, RotationOutcome::Replayed { .. }), "{outcome:?}");
    assert_reuse(database, store.as_ref(), &third, first.rotation()).await;
}

async fn with_no_window_a_retry_is_a_reuse(database: &Database) {
    let store = database.store().await;
    let (first, second) = refreshed_once(store.as_ref()).await;
    // Not even in the very microsecond of the exchange, which the SQLite half is still in.
    let retry = Rotation { retry_window: Duration::ZERO, ..first.rotation() };
    assert_reuse(database, store.as_ref(), &second, retry).await;
}

async fn an_older_token_is_a_reuse_and_ends_the_session(database: &Database) {
    let store = database.store().await;
    let (first, second) = refreshed_once(store.as_ref()).await;
    let third = refresh(store.as_ref(), &second).await;
    assert_reuse(database, store.as_ref(), &third, first.rotation()).await;
}

async fn another_token_of_the_live_generation_is_a_reuse_and_ends_the_session(database: &Database) {
    let store = database.store().await;
    let (first, second) = refreshed_once(store.as_ref()).await;
    let forked = first.successor("another lineage");
    assert_reuse(database, store.as_ref(), &second, forked.rotation()).await;
}

async fn a_token_from_the_future_is_dead_and_changes_nothing(database: &Database) {
    let store = database.store().await;
    let (_, second) = refreshed_once(store.as_ref()).await;
    let future = second.successor("");
    assert_dead(database, store.as_ref(), &second, future.rotation()).await;
    assert!(is_alive(store.as_ref(), &second).await);
}

async fn an_unknown_session_is_dead(database: &Database) {
    let store = database.store().await;
    let (_, second) = refreshed_once(store.as_ref()).await;
    let mut rotation = second.rotation();
    rotation.next.session_id = SessionId(new_id());
    assert_dead(database, store.as_ref(), &second, rotation).await;
}

async fn somebody_elses_session_is_dead_and_unchanged(database: &Database) {
    let store = database.store().await;
    let (first, second) = refreshed_once(store.as_ref()).await;
    let other = sign_up(store.as_ref(), "grace").await;
    for token in [&first, &second] {
        for user_id in [other.id, UserId(new_id())] {
            let mut rotation = token.rotation();
            rotation.next.user_id = user_id;
            assert_dead(database, store.as_ref(), &second, rotation).await;
        }
    }
}

async fn a_revoked_session_is_dead_and_unchanged(database: &Database) {
    let store = database.store().await;
    let (first, second) = refreshed_once(store.as_ref()).await;
    log_out(store.as_ref(), &second).await;
    // The retry of one before the logout and the exchange of the live one after it are one and the same to the thief.
    assert_dead(database, store.as_ref(), &second, second.rotation()).await;
    assert_dead(database, store.as_ref(), &second, first.rotation()).await;
}

async fn an_expired_token_is_dead_and_unchanged(database: &Database) {
    let store = database.store().await;
    let (first, second) = refreshed_once(store.as_ref()).await;
    let expiry = second.grant.expire_time;
    assert_eq!(expiry, ISSUED + 7.days() + 1.hours());
    for token in [&first, &second] {
        let rotation = Rotation { context: audit_context_at(expiry), retry_window: 2 * WINDOW, ..token.rotation() };
        assert_dead(database, store.as_ref(), &second, rotation).await;
    }
    let rotation = Rotation { context: audit_context_at(expiry - 1.microseconds()), ..second.rotation() };
    let outcome = rotate(store.as_ref(), rotation).await;
    assert!(matches!(outcome, RotationOutcome::Rotated(_)), "a moment before: {outcome:?}");
}

async fn the_session_of_a_disabled_user_is_dead_and_unchanged(database: &Database) {
    let store = database.store().await;
    let (first, second) = refreshed_once(store.as_ref()).await;
    let user = second.grant.user_id;
    database.set_user(user, "disabled = true").await;
    let unknown = Rotation { presented_hash: RefreshHash([7; 32]), context: audit_context(), ..second.rotation() };
    for rotation in [first.rotation(), second.rotation(), unknown] {
        assert_dead(database, store.as_ref(), &second, rotation).await;
    }
    database.set_user(user, "disabled = false").await;
    refresh(store.as_ref(), &second).await;
}
