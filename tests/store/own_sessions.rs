//! The sessions of an account: listed, and revoked one by one or all together.

use std::net::IpAddr;

use postern::domain::{
    audit::AuditContext,
    ids::SessionId,
    ports::{NewSession, RotationOutcome, Store},
    session::SessionSummary,
};
use time::ext::NumericalDuration as _;

use crate::{
    fixtures::{
        NOW, Token, all_sessions, audit_context, audit_context_at, is_alive, log_in, log_out, new_id, new_session,
        refresh, sign_up_without_mail,
    },
    support::{Database, Engine, on_each_engine},
};

on_each_engine![
    a_session_is_listed_with_all_its_details,
    only_open_sessions_of_that_account_are_listed_newest_first,
    revoking_a_session_ends_it_at_once_and_keeps_the_others,
    only_an_open_session_of_that_account_can_be_revoked,
    revoking_all_sessions_of_an_account_counts_the_open_ones,
];

async fn listed(store: &dyn Store, token: &Token) -> Vec<SessionId> {
    let sessions = store.list_sessions(all_sessions(token.grant.user_id, NOW)).await.expect("the store");
    sessions.into_iter().map(|session| session.id).collect()
}

async fn a_session_is_listed_with_all_its_details(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let address: IpAddr = "2001:db8::1".parse().expect("an address");
    let context = AuditContext { client_ip: Some(address), ..audit_context() };
    let session = NewSession { context, user_agent: Some("curl/8 'x'".to_owned()), ..new_session(user.id) };
    let token = Token { grant: session.grant.clone(), hash: session.refresh_hash };
    store.open_session(session).await.expect("the store");
    let mut next = refresh(store.as_ref(), &token).await;
    if database.engine == Engine::Sqlite {
        // Where the database has no clock, the time of the step is the time of the last refresh.
        let later =
            postern::domain::ports::Rotation { context: audit_context_at(NOW + 5.minutes()), ..next.rotation() };
        assert!(matches!(store.rotate_refresh(later).await.expect("the store"), RotationOutcome::Rotated(_)));
        next = next.successor("");
    }
    let sessions = store.list_sessions(all_sessions(user.id, NOW)).await.expect("the store");
    assert_eq!(sessions.len(), 1);
    let last_refresh_time = sessions[0].last_refresh_time;
    match database.engine {
        Engine::Sqlite => assert_eq!(last_refresh_time, NOW + 5.minutes()),
        Engine::Postgres => {
            let age = "SELECT extract(epoch FROM clock_timestamp() - last_refresh_time)::bigint FROM sessions";
            assert!((0..60).contains(&database.sql.number(age).await));
        }
    }
    let expected = SessionSummary {
        id: token.grant.session_id,
        create_time: NOW,
        last_refresh_time,
        expire_time: next.grant.expire_time,
        client_ip: Some("2001:db8::1".to_owned()),
        user_agent: Some("curl/8 'x'".to_owned()),
    };
    assert_eq!(sessions, [expected]);
}

async fn only_open_sessions_of_that_account_are_listed_newest_first(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let user = sign_up_without_mail(database, store, "ada").await;
    let other = sign_up_without_mail(database, store, "grace").await;
    assert_eq!(store.list_sessions(all_sessions(user.id, NOW)).await.expect("the store"), []);
    let mut open = Vec::new();
    for number in 0..6 {
        log_in(store, &other).await;
        log_out(store, &log_in(store, &user).await).await;
        // Not inserted in the order of the ids.
        let mut session = new_session(user.id);
        session.grant.session_id = SessionId(uuid::Uuid::from_u128(u128::MAX / 8 * [3, 1, 5, 2, 4, 6][number]));
        open.push(session.grant.session_id);
        store.open_session(session).await.expect("the store");
    }
    open.sort_unstable();
    open.reverse();
    let token = log_in(store, &user).await;
    open.push(token.grant.session_id);
    open.sort_unstable_by(|one, another| another.cmp(one));
    assert_eq!(listed(store, &token).await, open);

    let expiry = token.grant.expire_time;
    let at_expiry = store.list_sessions(all_sessions(user.id, expiry)).await.expect("the store");
    assert_eq!(at_expiry, [], "all sessions expire at the same time");
    let before = store.list_sessions(all_sessions(user.id, expiry - 1.microseconds())).await.expect("the store");
    assert_eq!(before.len(), 7);
}

async fn revoking_a_session_ends_it_at_once_and_keeps_the_others(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let user = sign_up_without_mail(database, store, "ada").await;
    let [stays, ends] = [log_in(store, &user).await, log_in(store, &user).await];
    assert!(store.revoke_session(ends.grant.session_id, user.id, audit_context()).await.expect("the store"));
    assert!(!is_alive(store, &ends).await);
    assert_eq!(store.rotate_refresh(ends.rotation()).await.expect("the store"), RotationOutcome::Invalid);
    assert_eq!(database.revoke_reason(&ends).await, "ended_by_owner");
    assert_eq!(listed(store, &stays).await, [stays.grant.session_id]);
    refresh(store, &stays).await;
}

async fn only_an_open_session_of_that_account_can_be_revoked(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let user = sign_up_without_mail(database, store, "ada").await;
    let other = sign_up_without_mail(database, store, "grace").await;
    let token = log_in(store, &user).await;
    let (id, other_session) = (token.grant.session_id, log_in(store, &other).await.grant.session_id);
    let before = database.everything().await;
    for (session, user_id) in [(other_session, user.id), (id, other.id), (SessionId(new_id()), user.id)] {
        assert!(!store.revoke_session(session, user_id, audit_context()).await.expect("the store"));
    }
    let late = audit_context_at(token.grant.expire_time);
    assert!(!store.revoke_session(id, user.id, late).await.expect("the store"), "the session has expired");
    assert_eq!(database.everything().await, before);

    let just_before = audit_context_at(token.grant.expire_time - 1.microseconds());
    assert!(store.revoke_session(id, user.id, just_before).await.expect("the store"));
    let before = database.everything().await;
    assert!(
        !store.revoke_session(id, user.id, audit_context()).await.expect("the store"),
        "the session has ended before"
    );
    assert_eq!(database.everything().await, before);
}

async fn revoking_all_sessions_of_an_account_counts_the_open_ones(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let user = sign_up_without_mail(database, store, "ada").await;
    let other = sign_up_without_mail(database, store, "grace").await;
    let other_token = log_in(store, &other).await;
    let before = log_in(store, &user).await;
    log_out(store, &before).await;
    let open = [log_in(store, &user).await, log_in(store, &user).await, log_in(store, &user).await];
    assert_eq!(store.revoke_user_sessions(user.id, audit_context()).await.expect("the store"), Some(3));
    for token in &open {
        assert!(!is_alive(store, token).await);
        assert_eq!(store.rotate_refresh(token.rotation()).await.expect("the store"), RotationOutcome::Invalid);
        assert_eq!(database.revoke_reason(token).await, "ended_by_admin");
    }
    assert_eq!(database.revoke_reason(&before).await, "logout");
    assert!(is_alive(store, &other_token).await);
    assert_eq!(store.revoke_user_sessions(user.id, audit_context()).await.expect("the store"), Some(0));
    log_in(store, &user).await;
}
