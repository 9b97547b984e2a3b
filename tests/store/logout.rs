//! Logging out of one session or of all sessions of a user: which tokens can do it, and repeated logouts.

use postern::domain::{
    ids::{SessionId, UserId},
    ports::{
        EmailChange, EmailChangeRequest, Logout, LogoutOutcome, PasswordChange, RotationOutcome, SessionOpening, Store,
    },
};
use time::ext::NumericalDuration as _;

use crate::{
    fixtures::{
        NOW, Token, audit_context_at, email_change, is_alive, log_in, log_out, new_id, new_session, password_change,
        refresh, sign_up,
    },
    support::{Database, on_each_engine},
};

on_each_engine![
    a_logout_ends_only_its_own_session,
    a_repeated_logout_succeeds_and_changes_nothing,
    a_logout_with_a_consumed_token_ends_its_own_session,
    nothing_that_was_under_way_survives_a_logout_everywhere,
    a_logout_of_an_unknown_session_is_refused,
    a_logout_with_another_users_id_is_refused,
    a_logout_everywhere_ends_all_sessions_of_that_user_only,
    the_previous_token_can_log_out_everywhere,
    a_logout_everywhere_with_a_consumed_token_ends_only_its_own_session,
    the_token_of_an_ended_session_cannot_log_out_everywhere,
    a_repeated_logout_everywhere_succeeds_and_keeps_later_sessions,
    a_session_that_another_one_ended_cannot_log_out_everywhere,
    an_expired_token_cannot_log_out_everywhere,
    a_disabled_user_can_still_log_out_everywhere,
];

async fn log_out_with(store: &dyn Store, logout: Logout) -> LogoutOutcome {
    store.logout(logout).await.expect("the store")
}

async fn two_sessions(store: &dyn Store) -> (Token, Token) {
    let user = sign_up(store, "ada").await;
    (log_in(store, &user).await, log_in(store, &user).await)
}

async fn assert_ended(database: &Database, store: &dyn Store, token: &Token) {
    assert!(database.is_revoked(token).await);
    assert!(!is_alive(store, token).await);
    let outcome = store.rotate_refresh(token.rotation()).await.expect("the store");
    assert_eq!(outcome, RotationOutcome::Invalid);
}

async fn a_logout_ends_only_its_own_session(database: &Database) {
    let store = database.store().await;
    let (token, other) = two_sessions(store.as_ref()).await;
    let unchanged = database.session_row(&other).await;
    assert_eq!(log_out_with(store.as_ref(), token.logout()).await, LogoutOutcome::LoggedOut);
    assert_ended(database, store.as_ref(), &token).await;
    assert_eq!(database.session_row(&other).await, unchanged);
}

async fn a_repeated_logout_succeeds_and_changes_nothing(database: &Database) {
    let store = database.store().await;
    let (token, _) = two_sessions(store.as_ref()).await;
    log_out(store.as_ref(), &token).await;
    let before = database.session_row(&token).await;
    let again = Logout { context: audit_context_at(NOW + 1.hours()), ..token.logout() };
    assert_eq!(log_out_with(store.as_ref(), again).await, LogoutOutcome::LoggedOut);
    assert_eq!(database.session_row(&token).await, before, "the revoke time does not change");
}

async fn a_logout_with_a_consumed_token_ends_its_own_session(database: &Database) {
    let store = database.store().await;
    let (first, other) = two_sessions(store.as_ref()).await;
    let second = refresh(store.as_ref(), &first).await;
    let third = refresh(store.as_ref(), &second).await;
    assert_eq!(log_out_with(store.as_ref(), first.logout()).await, LogoutOutcome::LoggedOut);
    assert_ended(database, store.as_ref(), &third).await;
    assert!(is_alive(store.as_ref(), &other).await);
}

async fn nothing_that_was_under_way_survives_a_logout_everywhere(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let user = sign_up(store, "ada").await;
    let token = log_in(store, &user).await;
    let caller = token.grant.session_id;
    assert_eq!(log_out_with(store, token.logout_everywhere()).await, LogoutOutcome::LoggedOut);
    // Both verified the password before the logout.
    let change = PasswordChange { caller, ..password_change(&user) };
    let opened = change.session.grant.session_id;
    assert_eq!(store.change_password(change).await.expect("the store"), SessionOpening::Refused);
    assert_eq!(store.user_of_session(opened, user.id).await.expect("the store"), None);
    let change = EmailChange { caller, ..email_change(&user, "new@example.com") };
    assert_eq!(store.request_email_change(change).await.expect("the store"), EmailChangeRequest::Refused);
}

async fn a_logout_of_an_unknown_session_is_refused(database: &Database) {
    let store = database.store().await;
    let (token, other) = two_sessions(store.as_ref()).await;
    for everywhere in [false, true] {
        let unknown = Logout { session_id: SessionId(new_id()), everywhere, ..token.logout() };
        assert_eq!(log_out_with(store.as_ref(), unknown).await, LogoutOutcome::Refused, "everywhere: {everywhere}");
    }
    assert!(is_alive(store.as_ref(), &token).await && is_alive(store.as_ref(), &other).await);
}

async fn a_logout_with_another_users_id_is_refused(database: &Database) {
    let store = database.store().await;
    let (token, other) = two_sessions(store.as_ref()).await;
    let stranger = sign_up(store.as_ref(), "grace").await;
    let stranger_token = log_in(store.as_ref(), &stranger).await;
    for user_id in [stranger.id, UserId(new_id())] {
        for everywhere in [false, true] {
            let logout = Logout { user_id, everywhere, ..token.logout() };
            assert_eq!(log_out_with(store.as_ref(), logout).await, LogoutOutcome::Refused, "everywhere: {everywhere}");
        }
    }
    for token in [&token, &other, &stranger_token] {
        assert!(is_alive(store.as_ref(), token).await);
    }
}

async fn a_logout_everywhere_ends_all_sessions_of_that_user_only(database: &Database) {
    let store = database.store().await;
    let (token, other) = two_sessions(store.as_ref()).await;
    let other = refresh(store.as_ref(), &other).await;
    let stranger = sign_up(store.as_ref(), "grace").await;
    let stranger_token = log_in(store.as_ref(), &stranger).await;
    assert_eq!(log_out_with(store.as_ref(), token.logout_everywhere()).await, LogoutOutcome::LoggedOut);
    for token in [&token, &other] {
        assert_ended(database, store.as_ref(), token).await;
    }
    assert!(is_alive(store.as_ref(), &stranger_token).await);
}

async fn the_previous_token_can_log_out_everywhere(database: &Database) {
    let store = database.store().await;
    let (first, other) = two_sessions(store.as_ref()).await;
    let second = refresh(store.as_ref(), &first).await;
    assert_eq!(log_out_with(store.as_ref(), first.logout_everywhere()).await, LogoutOutcome::LoggedOut);
    for token in [&second, &other] {
        assert_ended(database, store.as_ref(), token).await;
    }
}

async fn a_logout_everywhere_with_a_consumed_token_ends_only_its_own_session(database: &Database) {
    let store = database.store().await;
    let (first, other) = two_sessions(store.as_ref()).await;
    let second = refresh(store.as_ref(), &first).await;
    let third = refresh(store.as_ref(), &second).await;
    for attempt in ["once", "again"] {
        assert_eq!(log_out_with(store.as_ref(), first.logout_everywhere()).await, LogoutOutcome::Refused, "{attempt}");
        assert_ended(database, store.as_ref(), &third).await;
        assert!(is_alive(store.as_ref(), &other).await, "{attempt}");
    }
}

async fn the_token_of_an_ended_session_cannot_log_out_everywhere(database: &Database) {
    let store = database.store().await;
    let (token, other) = two_sessions(store.as_ref()).await;
    log_out(store.as_ref(), &token).await;
    let later = Logout { context: audit_context_at(NOW + 1.minutes()), ..token.logout_everywhere() };
    assert_eq!(log_out_with(store.as_ref(), later.clone()).await, LogoutOutcome::Refused);
    assert!(is_alive(store.as_ref(), &other).await);

    // The answer is the same when no other session is open: a success would claim that this token ended them.
    log_out(store.as_ref(), &other).await;
    assert_eq!(log_out_with(store.as_ref(), later).await, LogoutOutcome::Refused);
}

async fn a_repeated_logout_everywhere_succeeds_and_keeps_later_sessions(database: &Database) {
    let store = database.store().await;
    let (token, _) = two_sessions(store.as_ref()).await;
    assert_eq!(log_out_with(store.as_ref(), token.logout_everywhere()).await, LogoutOutcome::LoggedOut);

    let mut newer = new_session(token.grant.user_id);
    newer.context = audit_context_at(NOW + 1.minutes());
    let newer_token = Token { grant: newer.grant.clone(), hash: newer.refresh_hash };
    store.open_session(newer).await.expect("the store");

    let again = Logout { context: audit_context_at(NOW + 2.minutes()), ..token.logout_everywhere() };
    assert_eq!(log_out_with(store.as_ref(), again).await, LogoutOutcome::LoggedOut);
    assert!(is_alive(store.as_ref(), &newer_token).await);
}

async fn a_session_that_another_one_ended_cannot_log_out_everywhere(database: &Database) {
    let store = database.store().await;
    let (token, other) = two_sessions(store.as_ref()).await;
    assert_eq!(log_out_with(store.as_ref(), token.logout_everywhere()).await, LogoutOutcome::LoggedOut);
    assert_eq!(log_out_with(store.as_ref(), other.logout_everywhere()).await, LogoutOutcome::Refused);
    assert_eq!(database.sessions_where("revoke_reason = 'logout_everywhere'").await, 1);
    assert_eq!(database.sessions_where("revoke_reason = 'ended_elsewhere'").await, 1);
}

async fn an_expired_token_cannot_log_out_everywhere(database: &Database) {
    let store = database.store().await;
    let (token, other) = two_sessions(store.as_ref()).await;
    let logout_at_expiry = Logout { context: audit_context_at(token.grant.expire_time), ..token.logout_everywhere() };
    assert_eq!(log_out_with(store.as_ref(), logout_at_expiry).await, LogoutOutcome::Refused);
    assert_ended(database, store.as_ref(), &token).await;
    assert!(is_alive(store.as_ref(), &other).await);

    let just_before =
        Logout { context: audit_context_at(other.grant.expire_time - 1.microseconds()), ..other.logout_everywhere() };
    assert_eq!(log_out_with(store.as_ref(), just_before).await, LogoutOutcome::LoggedOut);
}

async fn a_disabled_user_can_still_log_out_everywhere(database: &Database) {
    let store = database.store().await;
    let (token, other) = two_sessions(store.as_ref()).await;
    database.set_user(token.grant.user_id, "disabled = true").await;
    assert_eq!(log_out_with(store.as_ref(), token.logout_everywhere()).await, LogoutOutcome::LoggedOut);
    database.set_user(token.grant.user_id, "disabled = false").await;
    for token in [&token, &other] {
        assert_ended(database, store.as_ref(), token).await;
    }
}
