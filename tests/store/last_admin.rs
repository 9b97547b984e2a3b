//! No step removes the last enabled admin, even if many run concurrently. Any error fails the test: on PostgreSQL, a
//! deadlock appears as an error.

use std::sync::Arc;

use postern::domain::{
    account::User,
    ports::{Store, UserChange, UserDeletion, UserDeletionOutcome},
};

use crate::{
    fixtures::{audit_context, deletion, log_in, roles, sign_up_admin, sign_up_without_mail},
    parallel::{all_at_once, assert_waits, begin, replicas},
    support::{Database, Engine, on_each_engine, with_database},
};

on_each_engine![
    the_last_admin_cannot_be_removed,
    other_roles_of_the_last_admin_can_change,
    disabled_admins_do_not_count,
    of_two_admins_that_remove_each_other_one_remains,
    of_five_admins_that_remove_each_other_one_remains,
];

/// A step that removes an admin.
#[derive(Debug, Clone, Copy)]
enum Removal {
    Demote,
    Disable,
    Delete,
    DeleteByOwner,
}

const REMOVALS: [Removal; 4] = [Removal::Demote, Removal::Disable, Removal::Delete, Removal::DeleteByOwner];

/// Removes an admin. `false` if it was refused because no enabled admin would be left.
async fn remove_admin(store: &dyn Store, admin: &User, removal: Removal) -> bool {
    let change = match removal {
        Removal::Demote => store.set_roles(admin.id, roles(&["user"]), audit_context()).await.expect("the store"),
        Removal::Disable => store.disable_user(admin.id, None, audit_context()).await.expect("the store"),
        Removal::Delete | Removal::DeleteByOwner => {
            let password_version = matches!(removal, Removal::DeleteByOwner).then_some(0);
            let deletion = UserDeletion { password_version, ..deletion(admin) };
            return match store.delete_user(deletion).await.expect("the store") {
                UserDeletionOutcome::Deleted => true,
                UserDeletionOutcome::LastAdmin => false,
                other => panic!("{removal:?}: {other:?}"),
            };
        }
    };
    match change {
        UserChange::Changed(_) => true,
        UserChange::LastAdmin => false,
        UserChange::NoSuchUser => panic!("{removal:?}: there is no such user"),
    }
}

async fn the_last_admin_cannot_be_removed(database: &Database) {
    let store = database.store().await;
    let admin = sign_up_admin(database, store.as_ref(), "ada").await;
    let user = sign_up_without_mail(database, store.as_ref(), "grace").await;
    database.add_role(user.id, "administrator").await;
    log_in(store.as_ref(), &admin).await;
    let before = database.everything().await;
    for removal in REMOVALS {
        assert!(!remove_admin(store.as_ref(), &admin, removal).await, "{removal:?}");
        assert_eq!(database.everything().await, before, "{removal:?}");
    }
    for removal in REMOVALS {
        let second = sign_up_admin(database, store.as_ref(), &format!("{removal:?}")).await;
        assert!(remove_admin(store.as_ref(), &second, removal).await, "{removal:?}: another admin remains");
        assert!(!remove_admin(store.as_ref(), &admin, removal).await, "{removal:?}: no other admin remains");
    }
    // An account that is not an admin can be removed while there is only one admin.
    for removal in [Removal::Disable, Removal::Delete] {
        assert!(remove_admin(store.as_ref(), &user, removal).await, "{removal:?}");
    }
    assert_eq!(database.enabled_admins().await, 1);
}

async fn other_roles_of_the_last_admin_can_change(database: &Database) {
    let store = database.store().await;
    let admin = sign_up_admin(database, store.as_ref(), "ada").await;
    for names in [&["admin", "support", "user"][..], &["admin", "user"]] {
        let change = store.set_roles(admin.id, roles(names), audit_context()).await.expect("the store");
        assert_eq!(change, UserChange::Changed(User { roles: roles(names), ..admin.clone() }));
    }
    assert_eq!(database.enabled_admins().await, 1);
}

async fn disabled_admins_do_not_count(database: &Database) {
    let store = database.store().await;
    let admin = sign_up_admin(database, store.as_ref(), "ada").await;
    for removal in REMOVALS {
        let second = sign_up_admin(database, store.as_ref(), &format!("{removal:?}")).await;
        assert!(remove_admin(store.as_ref(), &second, Removal::Disable).await);
        assert!(!remove_admin(store.as_ref(), &admin, removal).await, "{removal:?}: the other admin is disabled");
        // A disabled admin is not the last enabled admin, so it can be removed.
        if !matches!(removal, Removal::DeleteByOwner) {
            assert!(remove_admin(store.as_ref(), &second, removal).await, "{removal:?}");
        }
    }
    assert_eq!(database.enabled_admins().await, 1);
    // Where no admin is enabled, every account can be removed.
    database.set_user(admin.id, "disabled = true").await;
    let user = sign_up_without_mail(database, store.as_ref(), "grace").await;
    assert!(remove_admin(store.as_ref(), &user, Removal::Delete).await);
    assert!(remove_admin(store.as_ref(), &admin, Removal::Delete).await);
}

/// Removes `count` admins concurrently, by every kind of step. In further rounds their other roles change at the same
/// time, which writes the same rows.
async fn remove_each_other(database: &Database, count: usize, rounds: usize) {
    let [first, second] = replicas(database).await;
    let third = if database.engine == Engine::Postgres { database.store().await } else { Arc::clone(&first) };
    let stores = [first, second, third];
    for round in 0..rounds {
        let mut admins = Vec::new();
        for number in 0..count {
            admins.push(sign_up_admin(database, stores[0].as_ref(), &format!("admin-{round}-{number}")).await);
        }
        let steps = (0..count).map(|number| {
            let (store, admin) = (Arc::clone(&stores[number % 3]), admins[number].clone());
            // In even rounds all removals are of one kind; in odd rounds they are of different kinds.
            let removal = REMOVALS[if round % 2 == 0 { round / 2 } else { round / 2 + number } % 4];
            async move { remove_admin(store.as_ref(), &admin, removal).await }
        });
        let refused = all_at_once(steps).await.into_iter().filter(|removed| !removed).count();
        assert_eq!((refused, database.enabled_admins().await), (1, 1), "round {round}");
        database.sql.execute("DELETE FROM users").await;
    }
    for round in 0..rounds / 4 {
        let mut admins = Vec::new();
        for number in 0..count {
            admins.push(sign_up_admin(database, stores[0].as_ref(), &format!("busy-{round}-{number}")).await);
        }
        let steps = (0..count * 2).map(|number| {
            let (store, admin) = (Arc::clone(&stores[number % 3]), admins[number % count].clone());
            async move {
                if number < count {
                    // This makes a demoted account an admin again, so the round may end with more than one.
                    store
                        .set_roles(admin.id, roles(&["admin", "busy", "user"]), audit_context())
                        .await
                        .expect("the store");
                } else {
                    remove_admin(store.as_ref(), &admin, REMOVALS[round % 4]).await;
                }
            }
        });
        all_at_once(steps).await;
        assert!(database.enabled_admins().await >= 1, "round {round}");
        database.sql.execute("DELETE FROM users").await;
    }
}

async fn of_two_admins_that_remove_each_other_one_remains(database: &Database) {
    remove_each_other(database, 2, 64).await;
}

async fn of_five_admins_that_remove_each_other_one_remains(database: &Database) {
    remove_each_other(database, 5, 32).await;
}

/// A transaction that removes an admin and has not committed. The other removal must wait for it and check again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_postgres_removing_an_admin_waits_for_an_uncommitted_removal_of_another() {
    with_database(Engine::Postgres, async |database| {
        let store = database.store().await;
        for statement in [
            "UPDATE users SET disabled = true WHERE id =",
            "DELETE FROM user_roles WHERE role = 'admin' AND user_id =",
            "DELETE FROM users WHERE id =",
        ] {
            for removal in REMOVALS {
                let removed = sign_up_admin(database, store.as_ref(), "ada").await;
                let last = sign_up_admin(database, store.as_ref(), "grace").await;
                let rows = "SELECT user_id FROM user_roles WHERE role = 'admin' ORDER BY user_id FOR UPDATE";
                let transaction = begin(database, format!("{rows}; {statement} {}", database.id(removed.id.0))).await;
                let removing = tokio::spawn({
                    let store = Arc::clone(&store);
                    async move { remove_admin(store.as_ref(), &last, removal).await }
                });
                assert_waits(database, &removing).await;
                transaction.commit().await.expect("a commit");
                assert!(!removing.await.expect("the task did not panic"), "{statement}, {removal:?}");
                database.sql.execute("DELETE FROM users").await;
            }
        }
    })
    .await;
}
