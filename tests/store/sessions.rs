//! Opening a session, which user it identifies while it is alive, and purging it after its absolute end.

use std::net::IpAddr;

use postern::domain::{
    account::User,
    audit::AuditContext,
    ids::UserId,
    password::PasswordHash,
    ports::{NewSession, Rehash, SessionOpening, Store},
};
use time::ext::NumericalDuration as _;

use crate::{
    fixtures::{ISSUED, OLD_HASH, audit_context, is_alive, log_in, log_out, new_id, new_session, refresh, sign_up},
    support::{Database, Engine, on_each_engine},
};

on_each_engine![
    a_session_opens_with_all_its_details,
    a_session_opens_with_the_current_roles,
    a_session_is_refused_to_a_disabled_account,
    a_session_is_refused_after_a_password_change,
    a_session_is_refused_to_an_unknown_account,
    a_rehash_replaces_the_hash_and_nothing_else,
    of_two_logins_that_rehash_both_open_and_the_first_hash_is_stored,
    a_session_identifies_its_user_while_both_are_active,
    only_sessions_past_their_absolute_end_are_purged,
    sessions_are_purged_oldest_first_up_to_the_limit,
];

fn rehash(from: &str, to: &str) -> Rehash {
    let hash = |phc: &str| PasswordHash::from_phc(phc.to_owned());
    Rehash { from: hash(from), to: hash(to) }
}

async fn stored_hash(store: &dyn Store, user: &User) -> String {
    let credentials = store.credentials(&user.email).await.expect("the store").expect("an account");
    credentials.password_hash.as_str().to_owned()
}

async fn a_session_opens_with_all_its_details(database: &Database) {
    let store = database.store().await;
    let user = sign_up(store.as_ref(), "ada").await;
    let address: IpAddr = "2001:db8::1".parse().expect("an address");
    let context = AuditContext { client_ip: Some(address), ..audit_context() };
    let session = NewSession { context, user_agent: Some("curl/8 'x'".to_owned()), ..new_session(user.id) };
    let id = session.grant.session_id;

    let opening = store.open_session(session).await.expect("the store");
    assert_eq!(opening, SessionOpening::Opened(user.clone()));
    assert_eq!(store.user_of_session(id, user.id).await.expect("the store"), Some(user));
    let kept = database.sql.text("SELECT client_ip || ' ' || user_agent FROM sessions").await;
    assert_eq!(kept, "2001:db8::1 curl/8 'x'");
    assert_eq!(database.sessions_where("generation = 0 AND revoke_time IS NULL").await, 1);
}

async fn a_session_opens_with_the_current_roles(database: &Database) {
    let store = database.store().await;
    let user = sign_up(store.as_ref(), "ada").await;
    database.add_role(user.id, "admin").await;
    let SessionOpening::Opened(user) = store.open_session(new_session(user.id)).await.expect("the store") else {
        panic!("the session was refused");
    };
    assert_eq!(user.roles.iter().map(ToString::to_string).collect::<Vec<_>>(), ["admin", "user"]);
}

/// Asserts that opening a session is refused, with and without a rehash, and changes nothing.
async fn assert_refused(database: &Database, store: &dyn Store, user: UserId) {
    let session = NewSession { rehash: Some(rehash(OLD_HASH, "new")), ..new_session(user) };
    for session in [new_session(user), session] {
        assert_eq!(store.open_session(session).await.expect("the store"), SessionOpening::Refused);
    }
    assert_eq!(database.sessions_where("true").await, 0);
    assert_eq!(database.sql.number("SELECT count(*) FROM users WHERE password_hash = 'new'").await, 0);
}

async fn a_session_is_refused_to_a_disabled_account(database: &Database) {
    let store = database.store().await;
    let user = sign_up(store.as_ref(), "ada").await;
    database.set_user(user.id, "disabled = true").await;
    assert_refused(database, store.as_ref(), user.id).await;
}

async fn a_session_is_refused_after_a_password_change(database: &Database) {
    let store = database.store().await;
    let user = sign_up(store.as_ref(), "ada").await;
    database.set_user(user.id, "password_version = 1").await;
    assert_refused(database, store.as_ref(), user.id).await;
}

async fn a_session_is_refused_to_an_unknown_account(database: &Database) {
    let store = database.store().await;
    assert_refused(database, store.as_ref(), UserId(new_id())).await;
}

async fn a_rehash_replaces_the_hash_and_nothing_else(database: &Database) {
    let store = database.store().await;
    let user = sign_up(store.as_ref(), "ada").await;
    let other = sign_up(store.as_ref(), "grace").await;
    let before = store.credentials(&user.email).await.expect("the store").expect("an account");

    let session = NewSession { rehash: Some(rehash(OLD_HASH, "new")), ..new_session(user.id) };
    assert_eq!(store.open_session(session).await.expect("the store"), SessionOpening::Opened(user.clone()));

    let after = store.credentials(&user.email).await.expect("the store").expect("an account");
    assert_eq!(after.password_hash.as_str(), "new");
    assert_eq!((after.user, after.password_version), (before.user, before.password_version));
    assert_eq!(stored_hash(store.as_ref(), &other).await, OLD_HASH, "the hash of the other account does not change");
}

async fn of_two_logins_that_rehash_both_open_and_the_first_hash_is_stored(database: &Database) {
    let store = database.store().await;
    let user = sign_up(store.as_ref(), "ada").await;
    for new_hash in ["first", "second"] {
        let session = NewSession { rehash: Some(rehash(OLD_HASH, new_hash)), ..new_session(user.id) };
        assert_eq!(store.open_session(session).await.expect("the store"), SessionOpening::Opened(user.clone()));
    }
    assert_eq!(stored_hash(store.as_ref(), &user).await, "first");
    assert_eq!(database.sessions_where("revoke_time IS NULL").await, 2);
}

async fn a_session_identifies_its_user_while_both_are_active(database: &Database) {
    let store = database.store().await;
    let user = sign_up(store.as_ref(), "ada").await;
    let other = sign_up(store.as_ref(), "grace").await;
    let token = log_in(store.as_ref(), &user).await;
    let other_token = log_in(store.as_ref(), &other).await;
    let session = token.grant.session_id;
    assert!(is_alive(store.as_ref(), &token).await);
    assert_eq!(
        store.user_of_session(session, other.id).await.expect("the store"),
        None,
        "the session belongs to another user"
    );
    assert_eq!(
        store.user_of_session(session, UserId(new_id())).await.expect("the store"),
        None,
        "the user does not exist"
    );

    database.add_role(user.id, "admin").await;
    let found = store.user_of_session(session, user.id).await.expect("the store").expect("a user");
    assert!(found.roles.iter().any(|role| role.as_str() == "admin"), "the roles are the current ones");

    database.set_user(user.id, "disabled = true").await;
    assert!(!is_alive(store.as_ref(), &token).await, "the user is disabled");
    database.set_user(user.id, "disabled = false").await;
    assert!(is_alive(store.as_ref(), &token).await, "the user is enabled again");

    let next = refresh(store.as_ref(), &token).await;
    assert!(is_alive(store.as_ref(), &next).await, "the session was refreshed");
    log_out(store.as_ref(), &next).await;
    assert!(!is_alive(store.as_ref(), &token).await, "the session was logged out");

    assert!(is_alive(store.as_ref(), &other_token).await);
    database.sql.execute(&format!("DELETE FROM users WHERE id = {}", database.id(other.id.0))).await;
    assert!(!is_alive(store.as_ref(), &other_token).await, "the user was deleted");
}

/// Opens a session whose absolute end is this many days after its opening.
async fn open_session_ending_after(store: &dyn Store, user: &User, days: i64) {
    let mut session = new_session(user.id);
    session.grant.session_end_time = ISSUED + days.days();
    assert_eq!(store.open_session(session).await.expect("the store"), SessionOpening::Opened(user.clone()));
}

async fn only_sessions_past_their_absolute_end_are_purged(database: &Database) {
    let store = database.store().await;
    let user = sign_up(store.as_ref(), "ada").await;
    let ended_early = log_in(store.as_ref(), &user).await;
    log_out(store.as_ref(), &ended_early).await;
    open_session_ending_after(store.as_ref(), &user, 90).await;
    open_session_ending_after(store.as_ref(), &user, 89).await;

    let purge = async |now| store.purge_sessions(now, 100).await.expect("the store");
    assert_eq!(purge(ISSUED + 89.days()).await, 0, "a session is kept until its absolute end is past");
    assert_eq!(purge(ISSUED + 89.days() + 1.microseconds()).await, 1);
    assert_eq!(purge(ISSUED + 90.days()).await, 0, "a revoked session is kept, so that a reuse is still detected");
    assert_eq!(purge(ISSUED + 91.days()).await, 2);
    assert_eq!(database.sessions_where("true").await, 0);
    assert_eq!(database.sql.number("SELECT count(*) FROM users").await, 1);
}

async fn sessions_are_purged_oldest_first_up_to_the_limit(database: &Database) {
    let store = database.store().await;
    let user = sign_up(store.as_ref(), "ada").await;
    for days in [4, 2, 5, 1, 3] {
        open_session_ending_after(store.as_ref(), &user, days).await;
    }
    let purge = async |limit| store.purge_sessions(ISSUED + 10.days(), limit).await.expect("the store");
    assert_eq!(purge(2).await, 2);
    let oldest = match database.engine {
        Engine::Sqlite => "SELECT min(end_time - refresh_issue_time) / 1000000 / 86400 FROM sessions",
        Engine::Postgres => "SELECT extract(day FROM min(end_time - refresh_issue_time))::bigint FROM sessions",
    };
    assert_eq!(database.sql.number(oldest).await, 3);
    assert_eq!(purge(0).await, 0);
    assert_eq!(purge(2).await, 2);
    assert_eq!(purge(2).await, 1);
    assert_eq!(purge(2).await, 0);
}
