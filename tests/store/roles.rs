//! Roles: set, added, taken away, and told to every replica.

use postern::domain::{
    account::User,
    admin::role_set,
    ids::UserId,
    ports::{Revocation, Revoked, RotationOutcome, UserChange},
};

use crate::{
    fixtures::{audit_context, audit_context_of, is_alive, log_in, new_id, roles, sign_up_quietly},
    support::{Database, Engine, on_each_engine, with_database},
};

on_each_engine![
    roles_that_are_set_take_the_place_of_those_before,
    a_change_of_roles_is_in_the_log_with_the_roles_since,
    the_same_roles_again_write_nothing,
    a_change_of_roles_bites_at_the_next_refresh_and_ends_no_session,
    nobody_gets_no_roles,
];

async fn roles_that_are_set_take_the_place_of_those_before(database: &Database) {
    let store = database.store().await;
    let user = sign_up_quietly(database, store.as_ref(), "ada").await;
    let other = sign_up_quietly(database, store.as_ref(), "grace").await;
    for names in [
        &["support", "user"][..],
        &["admin", "support", "user"],
        &["admin", "billing-read", "billing_read", "user"],
        &["billing-read", "user"],
        &["user"],
    ] {
        // Another admin, so that the first may cease to be one.
        database.add_role(other.id, "admin").await;
        let of = audit_context_of(None);
        // As they come: they are sorted when they are read.
        let mut asked = roles(names);
        asked.reverse();
        let expected = User { roles: roles(names), update_time: of.now, ..user.clone() };
        let change = store.set_roles(user.id, asked, of).await.expect("the store");
        assert_eq!(change, UserChange::Changed(expected.clone()));
        assert_eq!(store.user(user.id).await.expect("the store"), Some(expected));
        database
            .sql
            .execute(&format!("DELETE FROM user_roles WHERE role = 'admin' AND user_id = {}", database.id(other.id.0)))
            .await;
        assert_eq!(store.user(other.id).await.expect("the store"), Some(other.clone()), "somebody else's are theirs");
    }
}

async fn a_change_of_roles_is_in_the_log_with_the_roles_since(database: &Database) {
    let store = database.store().await;
    let user = sign_up_quietly(database, store.as_ref(), "ada").await;
    log_in(store.as_ref(), &user).await;
    let of = audit_context_of(None);
    for names in [&["admin", "support", "user"][..], &["user"]] {
        database.add_role(sign_up_quietly(database, store.as_ref(), names[0]).await.id, "admin").await;
        let of = postern::domain::audit::AuditContext { event: audit_context().event, ..of };
        store.set_roles(user.id, roles(names), of).await.expect("the store");
    }
    let lines = store.revocations(0, &[]).await.expect("the store");
    let expected = |number, names| Revocation {
        number,
        what: Revoked::Roles(user.id, roles(names)),
        retain_until: of.retain_until,
    };
    assert_eq!(lines, [expected(1, &["admin", "support", "user"][..]), expected(2, &["user"])]);
}

async fn the_same_roles_again_write_nothing(database: &Database) {
    let store = database.store().await;
    let user = sign_up_quietly(database, store.as_ref(), "ada").await;
    let names = ["billing-read", "billing_read", "support", "user"];
    let UserChange::Changed(user) = store.set_roles(user.id, roles(&names), audit_context()).await.expect("the store")
    else {
        panic!("refused");
    };
    let before = database.everything().await;
    let again = store.set_roles(user.id, roles(&names), audit_context_of(None)).await.expect("the store");
    assert_eq!(again, UserChange::Changed(user));
    assert_eq!(database.everything().await, before);
}

/// A database that was made for people sorts `_` before `-`; roles are sorted by their bytes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_postgres_the_order_of_roles_is_not_that_of_the_databases_language() {
    with_database(Engine::Postgres, async |database| {
        database.store().await;
        database.sql.execute("ALTER TABLE user_roles ALTER COLUMN role TYPE text COLLATE \"und-x-icu\"").await;
        let order = "SELECT string_agg(role, ' ' ORDER BY role COLLATE \"und-x-icu\") \
                     FROM unnest(ARRAY['a-b', 'a_b']) AS role";
        assert_eq!(database.sql.text(order).await, "a_b a-b", "this test tests nothing");
        roles_that_are_set_take_the_place_of_those_before(database).await;
    })
    .await;
    with_database(Engine::Postgres, async |database| {
        database.store().await;
        database.sql.execute("ALTER TABLE user_roles ALTER COLUMN role TYPE text COLLATE \"und-x-icu\"").await;
        the_same_roles_again_write_nothing(database).await;
    })
    .await;
}

async fn a_change_of_roles_bites_at_the_next_refresh_and_ends_no_session(database: &Database) {
    let store = database.store().await;
    let user = sign_up_quietly(database, store.as_ref(), "ada").await;
    let token = log_in(store.as_ref(), &user).await;
    store.set_roles(user.id, roles(&["support", "user"]), audit_context()).await.expect("the store");
    assert!(is_alive(store.as_ref(), &token).await);
    let RotationOutcome::Rotated(user) = store.rotate_refresh(token.rotation()).await.expect("the store") else {
        panic!("the session ended");
    };
    assert_eq!(user.roles, roles(&["support", "user"]));
}

async fn nobody_gets_no_roles(database: &Database) {
    let store = database.store().await;
    let before = database.everything().await;
    let change = store.set_roles(UserId(new_id()), roles(&["admin"]), audit_context()).await.expect("the store");
    assert_eq!(change, UserChange::NoSuchUser);
    assert_eq!(database.everything().await, before);
}

#[test]
fn the_roles_that_an_account_is_to_have_are_sorted_and_user_is_among_them() {
    let set = |names: &[&str]| role_set(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
    assert_eq!(set(&[]).expect("roles"), roles(&["user"]));
    assert_eq!(set(&["support", "admin", "support"]).expect("roles"), roles(&["admin", "support", "user"]));
    assert_eq!(set(&["zeta", "user"]).expect("roles"), roles(&["user", "zeta"]));
    set(&["Admin"]).expect_err("not a name");
}
