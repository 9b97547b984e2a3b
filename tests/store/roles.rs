//! Roles: set, added, removed, and logged for every replica.

use postern::domain::{
    account::User,
    admin::role_set,
    ids::UserId,
    ports::{Revocation, Revoked, RotationOutcome, UserChange},
};

use crate::{
    fixtures::{audit_context, audit_context_by, is_alive, log_in, new_id, roles, sign_up_without_mail},
    support::{Database, Engine, on_each_engine, with_database},
};

on_each_engine![
    set_roles_replaces_the_roles_of_the_account,
    a_change_of_roles_is_logged_with_the_new_roles,
    setting_the_same_roles_again_writes_nothing,
    a_change_of_roles_takes_effect_at_the_next_refresh_and_ends_no_session,
    an_unknown_account_gets_no_roles,
];

async fn set_roles_replaces_the_roles_of_the_account(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let other = sign_up_without_mail(database, store.as_ref(), "grace").await;
    for names in [
        &["support", "user"][..],
        &["admin", "support", "user"],
        &["admin", "billing-read", "billing_read", "user"],
        &["billing-read", "user"],
        &["user"],
    ] {
        // Another admin, so that the first can lose the role.
        database.add_role(other.id, "admin").await;
        let context = audit_context_by(None);
        // Written in any order; sorted when they are read.
        let mut new_roles = roles(names);
        new_roles.reverse();
        let expected = User { roles: roles(names), update_time: context.now, ..user.clone() };
        let change = store.set_roles(user.id, new_roles, context).await.expect("the store");
        assert_eq!(change, UserChange::Changed(expected.clone()));
        assert_eq!(store.user(user.id).await.expect("the store"), Some(expected));
        database
            .sql
            .execute(&format!("DELETE FROM user_roles WHERE role = 'admin' AND user_id = {}", database.id(other.id.0)))
            .await;
        assert_eq!(
            store.user(other.id).await.expect("the store"),
            Some(other.clone()),
            "the roles of the other account do not change"
        );
    }
}

async fn a_change_of_roles_is_logged_with_the_new_roles(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    log_in(store.as_ref(), &user).await;
    let context = audit_context_by(None);
    for names in [&["admin", "support", "user"][..], &["user"]] {
        database.add_role(sign_up_without_mail(database, store.as_ref(), names[0]).await.id, "admin").await;
        let context = postern::domain::audit::AuditContext { event: audit_context().event, ..context };
        store.set_roles(user.id, roles(names), context).await.expect("the store");
    }
    let entries = store.revocations(0, &[]).await.expect("the store");
    let expected = |number, names| Revocation {
        number,
        what: Revoked::Roles(user.id, Some(roles(names))),
        revoke_time: context.now,
        retain_until: context.retain_until,
    };
    assert_eq!(entries, [expected(1, &["admin", "support", "user"][..]), expected(2, &["user"])]);
}

async fn setting_the_same_roles_again_writes_nothing(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let names = ["billing-read", "billing_read", "support", "user"];
    let UserChange::Changed(user) = store.set_roles(user.id, roles(&names), audit_context()).await.expect("the store")
    else {
        panic!("the change was refused");
    };
    let before = database.everything().await;
    let again = store.set_roles(user.id, roles(&names), audit_context_by(None)).await.expect("the store");
    assert_eq!(again, UserChange::Changed(user));
    assert_eq!(database.everything().await, before);
}

/// A database with a natural-language collation sorts `_` before `-`; roles are sorted by their bytes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_postgres_the_order_of_roles_does_not_depend_on_the_collation() {
    with_database(Engine::Postgres, async |database| {
        database.store().await;
        database.sql.execute("ALTER TABLE user_roles ALTER COLUMN role TYPE text COLLATE \"und-x-icu\"").await;
        let order = "SELECT string_agg(role, ' ' ORDER BY role COLLATE \"und-x-icu\") \
                     FROM unnest(ARRAY['a-b', 'a_b']) AS role";
        assert_eq!(
            database.sql.text(order).await,
            "a_b a-b",
            "the collation sorts like bytes, so this test has no effect"
        );
        set_roles_replaces_the_roles_of_the_account(database).await;
    })
    .await;
    with_database(Engine::Postgres, async |database| {
        database.store().await;
        database.sql.execute("ALTER TABLE user_roles ALTER COLUMN role TYPE text COLLATE \"und-x-icu\"").await;
        setting_the_same_roles_again_writes_nothing(database).await;
    })
    .await;
}

async fn a_change_of_roles_takes_effect_at_the_next_refresh_and_ends_no_session(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let token = log_in(store.as_ref(), &user).await;
    store.set_roles(user.id, roles(&["support", "user"]), audit_context()).await.expect("the store");
    assert!(is_alive(store.as_ref(), &token).await);
    let RotationOutcome::Rotated(user) = store.rotate_refresh(token.rotation()).await.expect("the store") else {
        panic!("the session ended");
    };
    assert_eq!(user.roles, roles(&["support", "user"]));
}

async fn an_unknown_account_gets_no_roles(database: &Database) {
    let store = database.store().await;
    let before = database.everything().await;
    let change = store.set_roles(UserId(new_id()), roles(&["admin"]), audit_context()).await.expect("the store");
    assert_eq!(change, UserChange::NoSuchUser);
    assert_eq!(database.everything().await, before);
}

#[test]
fn role_set_sorts_the_roles_and_adds_user() {
    let set = |names: &[&str]| role_set(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
    assert_eq!(set(&[]).expect("roles"), roles(&["user"]));
    assert_eq!(set(&["support", "admin", "support"]).expect("roles"), roles(&["admin", "support", "user"]));
    assert_eq!(set(&["zeta", "user"]).expect("roles"), roles(&["user", "zeta"]));
    set(&["Admin"]).expect_err("a role must be lower-case");
}
