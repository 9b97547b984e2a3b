//! Refreshing: how a presented token is classified, and what that does to its session.

use std::time::Duration;

use postern::domain::{
    ids::{SessionId, UserId},
    ports::{Rotation, RotationOutcome, Store},
    seen::SeenGeneration,
    session::RefreshHash,
};
use time::ext::NumericalDuration as _;

use crate::{
    fixtures::{
        ISSUED, NOW, Token, WINDOW, audit_context, audit_context_at, is_alive, log_in, log_out, new_id, refresh,
        sign_up,
    },
    support::{Database, Engine, on_each_engine},
};

on_each_engine![
    the_current_token_is_replaced_by_the_next_one,
    every_refresh_returns_the_current_roles,
    a_session_can_be_refreshed_many_times,
    a_replay_within_the_retry_window_returns_the_same_token_and_changes_nothing,
    the_previous_token_is_replayed_until_the_retry_window_ends,
    the_retry_window_starts_at_the_last_rotation,
    a_rotation_by_a_clock_that_was_ahead_does_not_make_the_retry_window_longer,
    without_a_retry_window_the_previous_token_is_a_reuse,
    the_previous_token_is_replayed_for_long_while_nothing_was_seen_of_its_successor,
    after_its_successor_was_seen_the_previous_token_is_replayed_in_a_race_only,
    what_a_replica_has_seen_and_not_written_counts_there,
    what_was_seen_of_an_older_generation_does_not_count,
    the_generation_that_was_seen_only_grows,
    refresh_with_a_consumed_token_ends_the_session,
    another_token_of_the_current_generation_ends_the_session,
    a_token_of_a_later_generation_carries_the_session_on_and_uses_up_the_older_ones,
    a_token_of_a_later_generation_revives_no_session,
    a_token_of_an_unknown_session_is_invalid,
    a_token_with_another_users_id_is_invalid_and_changes_nothing,
    a_token_of_a_revoked_session_is_invalid_and_changes_nothing,
    an_expired_token_is_invalid_and_changes_nothing,
    a_token_of_a_disabled_user_is_invalid_and_changes_nothing,
];

async fn rotate(store: &dyn Store, rotation: Rotation) -> RotationOutcome {
    store.rotate_refresh(rotation).await.expect("the store")
}

/// The previous and the current token of a session.
async fn refreshed_once(store: &dyn Store) -> (Token, Token) {
    let user = sign_up(store, "ada").await;
    let first = log_in(store, &user).await;
    let second = refresh(store, &first).await;
    (first, second)
}

/// Asserts that a rotation is invalid and does not change the session of `token`.
async fn assert_invalid(database: &Database, store: &dyn Store, token: &Token, rotation: Rotation) {
    let before = database.session_row(token).await;
    assert_eq!(rotate(store, rotation).await, RotationOutcome::Invalid);
    assert_eq!(database.session_row(token).await, before);
}

/// Asserts that a rotation is a reuse and ends the session, also for the holder of its current token.
async fn assert_reuse(database: &Database, store: &dyn Store, current: &Token, rotation: Rotation) {
    assert!(is_alive(store, current).await);
    assert_eq!(rotate(store, rotation.clone()).await, RotationOutcome::Reused);
    assert!(database.is_revoked(current).await);
    assert!(!is_alive(store, current).await);
    assert_eq!(rotate(store, current.rotation()).await, RotationOutcome::Invalid);
    assert_eq!(rotate(store, rotation).await, RotationOutcome::Invalid, "the session has ended");
}

async fn the_current_token_is_replaced_by_the_next_one(database: &Database) {
    let store = database.store().await;
    let user = sign_up(store.as_ref(), "ada").await;
    let other = log_in(store.as_ref(), &user).await;
    let unchanged = database.session_row(&other).await;
    let first = log_in(store.as_ref(), &user).await;
    let second = first.successor("");

    assert_eq!(rotate(store.as_ref(), first.replaced_by(&second)).await, RotationOutcome::Rotated(user));
    assert_eq!(database.sessions_where("generation = 1 AND revoke_time IS NULL").await, 1);
    assert_eq!(database.session_row(&other).await, unchanged, "another session of the user does not change");
    refresh(store.as_ref(), &second).await;
}

async fn every_refresh_returns_the_current_roles(database: &Database) {
    let store = database.store().await;
    let user = sign_up(store.as_ref(), "ada").await;
    let token = log_in(store.as_ref(), &user).await;
    database.set_user(user.id, "email_verified = true").await;

    for (step, role) in [("the rotation", "admin"), ("the replay", "billing")] {
        database.add_role(user.id, role).await;
        let (RotationOutcome::Rotated(found) | RotationOutcome::Replayed { user: found, .. }) =
            rotate(store.as_ref(), token.rotation()).await
        else {
            panic!("{step} was refused");
        };
        assert!(found.roles.iter().any(|found| found.as_str() == role), "{step}: {:?}", found.roles);
        assert!(found.email_verified, "{step}");
    }
}

async fn a_session_can_be_refreshed_many_times(database: &Database) {
    let store = database.store().await;
    let user = sign_up(store.as_ref(), "ada").await;
    let mut token = log_in(store.as_ref(), &user).await;
    for _ in 0..20 {
        token = refresh(store.as_ref(), &token).await;
    }
    assert_eq!(token.grant.generation, 20);
    assert_eq!(database.sessions_where("generation = 20").await, 1);
}

async fn a_replay_within_the_retry_window_returns_the_same_token_and_changes_nothing(database: &Database) {
    let store = database.store().await;
    let (first, second) = refreshed_once(store.as_ref()).await;
    let before = database.session_row(&second).await;

    // The token that a retry a second later would have minted.
    let mut minted_later = first.successor("a second later");
    minted_later.grant.issue_time += 1.seconds();
    minted_later.grant.expire_time += 1.seconds();
    for _ in 0..3 {
        let RotationOutcome::Replayed { grant, hash, user } =
            rotate(store.as_ref(), first.replaced_by(&minted_later)).await
        else {
            panic!("the token was not replayed");
        };
        assert_eq!(Token { grant, hash }, second);
        assert_eq!(user.id, second.grant.user_id);
    }
    assert_eq!(database.session_row(&second).await, before);
    refresh(store.as_ref(), &second).await;
}

async fn the_previous_token_is_replayed_until_the_retry_window_ends(database: &Database) {
    let store = database.store().await;
    let (first, second) = refreshed_once(store.as_ref()).await;

    let presented = Rotation { retry_window: Duration::from_mins(1), ..first.rotation() };

    // PostgreSQL's clock runs during the test, so there the end of the window is not tested to the microsecond.
    let (within_window, past_window) = match database.engine {
        Engine::Sqlite => (Duration::from_mins(1), Duration::from_micros(1)),
        Engine::Postgres => (Duration::from_secs(30), Duration::from_secs(31)),
    };
    database.age_rotation(&second, within_window).await;
    let outcome = rotate(store.as_ref(), presented.clone()).await;
    assert!(matches!(outcome, RotationOutcome::Replayed { .. }), "{outcome:?}");
    database.age_rotation(&second, past_window).await;
    assert_reuse(database, store.as_ref(), &second, presented).await;
}

async fn the_retry_window_starts_at_the_last_rotation(database: &Database) {
    let store = database.store().await;
    let (first, second) = refreshed_once(store.as_ref()).await;
    database.age_rotation(&second, 2 * WINDOW).await;
    let third = refresh(store.as_ref(), &second).await;
    let outcome = rotate(store.as_ref(), second.rotation()).await;
    assert!(matches!(outcome, RotationOutcome::Replayed { .. }), "{outcome:?}");
    assert_reuse(database, store.as_ref(), &third, first.rotation()).await;
}

async fn a_rotation_by_a_clock_that_was_ahead_does_not_make_the_retry_window_longer(database: &Database) {
    let store = database.store().await;
    let (first, second) = refreshed_once(store.as_ref()).await;
    let later = match database.engine {
        Engine::Sqlite => "last_refresh_time + 864000000000",
        Engine::Postgres => "last_refresh_time + interval '10 days'",
    };
    database.sql.execute(&format!("UPDATE sessions SET last_refresh_time = {later}")).await;
    assert_reuse(database, store.as_ref(), &second, first.rotation()).await;
}

async fn without_a_retry_window_the_previous_token_is_a_reuse(database: &Database) {
    let store = database.store().await;
    let (first, second) = refreshed_once(store.as_ref()).await;
    // A window of zero does not include the microsecond of the rotation, which on SQLite is still the current one.
    let retry = Rotation { retry_window: Duration::ZERO, ..first.rotation() };
    assert_reuse(database, store.as_ref(), &second, retry).await;
}

/// Presents a token as it is presented when both windows are open for long.
fn patient(token: &Token) -> Rotation {
    Rotation { lost_answer_window: Duration::from_hours(24), ..token.rotation() }
}

fn seen(token: &Token) -> SeenGeneration {
    SeenGeneration { session: token.grant.session_id, generation: token.grant.generation }
}

async fn write_all_seen(store: &dyn Store, seen: &[SeenGeneration]) {
    assert_eq!(store.write_seen(seen).await.expect("the store"), [], "no other step has locked a row");
}

async fn the_previous_token_is_replayed_for_long_while_nothing_was_seen_of_its_successor(database: &Database) {
    let store = database.store().await;
    let (first, second) = refreshed_once(store.as_ref()).await;
    for hours in [0, 1, 22] {
        database.age_rotation(&second, Duration::from_hours(hours)).await;
        let before = database.session_row(&second).await;
        let outcome = rotate(store.as_ref(), patient(&first)).await;
        let RotationOutcome::Replayed { grant, hash, .. } = outcome else {
            panic!("{hours} hours later: {outcome:?}");
        };
        assert_eq!(Token { grant, hash }, second);
        assert_eq!(database.session_row(&second).await, before, "nothing changes");
    }
    database.age_rotation(&second, Duration::from_mins(61)).await;
    assert_reuse(database, store.as_ref(), &second, patient(&first)).await;
}

async fn after_its_successor_was_seen_the_previous_token_is_replayed_in_a_race_only(database: &Database) {
    let store = database.store().await;
    let (first, second) = refreshed_once(store.as_ref()).await;
    write_all_seen(store.as_ref(), &[seen(&second)]).await;
    let outcome = rotate(store.as_ref(), patient(&first)).await;
    assert!(matches!(outcome, RotationOutcome::Replayed { .. }), "two calls may have raced: {outcome:?}");
    database.age_rotation(&second, 2 * WINDOW).await;
    assert_reuse(database, store.as_ref(), &second, patient(&first)).await;
}

async fn what_a_replica_has_seen_and_not_written_counts_there(database: &Database) {
    let store = database.store().await;
    let (first, second) = refreshed_once(store.as_ref()).await;
    database.age_rotation(&second, 2 * WINDOW).await;
    let elsewhere = rotate(store.as_ref(), patient(&first)).await;
    assert!(matches!(elsewhere, RotationOutcome::Replayed { .. }), "{elsewhere:?}");
    let here = Rotation { seen_generation: second.grant.generation, ..patient(&first) };
    assert_reuse(database, store.as_ref(), &second, here).await;
}

async fn what_was_seen_of_an_older_generation_does_not_count(database: &Database) {
    let store = database.store().await;
    let (_, second) = refreshed_once(store.as_ref()).await;
    let third = refresh(store.as_ref(), &second).await;
    write_all_seen(store.as_ref(), &[seen(&second)]).await;
    database.age_rotation(&third, 2 * WINDOW).await;
    let again = Rotation { seen_generation: second.grant.generation, ..patient(&second) };
    let outcome = rotate(store.as_ref(), again).await;
    assert!(matches!(outcome, RotationOutcome::Replayed { .. }), "{outcome:?}");
}

async fn the_generation_that_was_seen_only_grows(database: &Database) {
    let store = database.store().await;
    let user = sign_up(store.as_ref(), "ada").await;
    let tokens = [log_in(store.as_ref(), &user).await, log_in(store.as_ref(), &user).await];
    let sessions = tokens.each_ref().map(|token| token.grant.session_id);
    let unknown = SeenGeneration { session: SessionId(new_id()), generation: 9 };
    for (batch, expected) in [([4, 2], [4, 2]), ([3, 7], [4, 7]), ([5, 7], [5, 7])] {
        let batch = [0, 1].map(|at| SeenGeneration { session: sessions[at], generation: batch[at] });
        write_all_seen(store.as_ref(), &[batch[0], unknown, batch[1]]).await;
        for (token, generation) in tokens.iter().zip(expected) {
            let id = database.id(token.grant.session_id.0);
            let rows = database.sessions_where(&format!("id = {id} AND seen_generation = {generation}")).await;
            assert_eq!(rows, 1, "{batch:?}");
        }
    }
    write_all_seen(store.as_ref(), &[]).await;
}

async fn refresh_with_a_consumed_token_ends_the_session(database: &Database) {
    let store = database.store().await;
    let (first, second) = refreshed_once(store.as_ref()).await;
    let third = refresh(store.as_ref(), &second).await;
    assert_reuse(database, store.as_ref(), &third, first.rotation()).await;
}

async fn another_token_of_the_current_generation_ends_the_session(database: &Database) {
    let store = database.store().await;
    let (first, second) = refreshed_once(store.as_ref()).await;
    let forked = first.successor("another lineage");
    assert_reuse(database, store.as_ref(), &second, forked.rotation()).await;
}

/// Only a database that was restored from a backup does not know a token that is authentic.
async fn a_token_of_a_later_generation_carries_the_session_on_and_uses_up_the_older_ones(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let (_, second) = refreshed_once(store).await;
    let later = second.successor("").successor("");
    let next = later.successor("");
    assert!(matches!(rotate(store, later.replaced_by(&next)).await, RotationOutcome::Rotated(_)));
    assert!(matches!(rotate(store, later.replaced_by(&next)).await, RotationOutcome::Replayed { .. }), "a retry");
    assert_eq!(
        database.sql.number("SELECT count(*) FROM audit_events WHERE action = 'refresh_after_restore'").await,
        1
    );
    assert_reuse(database, store, &next, second.rotation()).await;
}

async fn a_token_of_a_later_generation_revives_no_session(database: &Database) {
    let store = database.store().await;
    let (_, second) = refreshed_once(store.as_ref()).await;
    let later = second.successor("");
    let expired = Rotation { presented_expire_time: NOW - 1.microseconds(), ..later.rotation() };
    assert_invalid(database, store.as_ref(), &second, expired).await;
    log_out(store.as_ref(), &second).await;
    assert_invalid(database, store.as_ref(), &second, later.rotation()).await;
}

async fn a_token_of_an_unknown_session_is_invalid(database: &Database) {
    let store = database.store().await;
    let (_, second) = refreshed_once(store.as_ref()).await;
    let mut rotation = second.rotation();
    rotation.next.session_id = SessionId(new_id());
    assert_invalid(database, store.as_ref(), &second, rotation).await;
}

async fn a_token_with_another_users_id_is_invalid_and_changes_nothing(database: &Database) {
    let store = database.store().await;
    let (first, second) = refreshed_once(store.as_ref()).await;
    let other = sign_up(store.as_ref(), "grace").await;
    for token in [&first, &second] {
        for user_id in [other.id, UserId(new_id())] {
            let mut rotation = token.rotation();
            rotation.next.user_id = user_id;
            assert_invalid(database, store.as_ref(), &second, rotation).await;
        }
    }
}

async fn a_token_of_a_revoked_session_is_invalid_and_changes_nothing(database: &Database) {
    let store = database.store().await;
    let (first, second) = refreshed_once(store.as_ref()).await;
    log_out(store.as_ref(), &second).await;
    // Neither the current nor the previous token is accepted after the logout.
    assert_invalid(database, store.as_ref(), &second, second.rotation()).await;
    assert_invalid(database, store.as_ref(), &second, first.rotation()).await;
}

async fn an_expired_token_is_invalid_and_changes_nothing(database: &Database) {
    let store = database.store().await;
    let (first, second) = refreshed_once(store.as_ref()).await;
    let expiry = second.grant.expire_time;
    assert_eq!(expiry, ISSUED + 7.days() + 1.hours());
    for token in [&first, &second] {
        let rotation = Rotation { context: audit_context_at(expiry), retry_window: 2 * WINDOW, ..token.rotation() };
        assert_invalid(database, store.as_ref(), &second, rotation).await;
    }
    let rotation = Rotation { context: audit_context_at(expiry - 1.microseconds()), ..second.rotation() };
    let outcome = rotate(store.as_ref(), rotation).await;
    assert!(matches!(outcome, RotationOutcome::Rotated(_)), "the token has not expired yet: {outcome:?}");
}

async fn a_token_of_a_disabled_user_is_invalid_and_changes_nothing(database: &Database) {
    let store = database.store().await;
    let (first, second) = refreshed_once(store.as_ref()).await;
    let user = second.grant.user_id;
    database.set_user(user, "disabled = true").await;
    let unknown = Rotation { presented_hash: RefreshHash([7; 32]), context: audit_context(), ..second.rotation() };
    for rotation in [first.rotation(), second.rotation(), unknown] {
        assert_invalid(database, store.as_ref(), &second, rotation).await;
    }
    database.set_user(user, "disabled = false").await;
    refresh(store.as_ref(), &second).await;
}
