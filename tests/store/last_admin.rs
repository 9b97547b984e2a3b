//! Nobody takes the last enabled admin away, not even many at once. An error is a failure of the test, whatever it
//! says: on PostgreSQL that is how a deadlock would come out.

use std::sync::Arc;

use postern::domain::{
    account::User,
    ports::{Store, UserChange, UserDeletion, UserDeletionOutcome},
};

use crate::{
    fixtures::{audit_context, deletion, log_in, roles, sign_up_admin, sign_up_quietly},
    parallel::{all_at_once, assert_waits, begin, replicas},
    support::{Database, Engine, on_each_engine, with_database},
};

on_each_engine![
    the_last_admin_cannot_be_taken_away,
    the_last_admin_may_gain_and_lose_other_roles,
    disabled_admins_do_not_count,
    of_two_admins_that_take_each_other_away_one_is_left,
    of_five_admins_that_take_each_other_away_one_is_left,
];

/// A way to take an admin away.
#[derive(Debug, Clone, Copy)]
enum Way {
    Demote,
    Disable,
    Delete,
    DeleteByOwner,
}

const WAYS: [Way; 4] = [Way::Demote, Way::Disable, Way::Delete, Way::DeleteByOwner];

/// Whether it was done; if not, because it was the last.
async fn take_away(store: &dyn Store, admin: &User, way: Way) -> bool {
    let change = match way {
        Way::Demote => store.set_roles(admin.id, roles(&["user"]), audit_context()).await.expect("the store"),
        Way::Disable => store.disable_user(admin.id, None, audit_context()).await.expect("the store"),
        Way::Delete | Way::DeleteByOwner => {
            let password_version = matches!(way, Way::DeleteByOwner).then_some(0);
            let deletion = UserDeletion { password_version, ..deletion(admin) };
            return match store.delete_user(deletion).await.expect("the store") {
                UserDeletionOutcome::Deleted => true,
                UserDeletionOutcome::LastAdmin => false,
                other => panic!("{way:?}: {other:?}"),
            };
        }
    };
    match change {
        UserChange::Changed(_) => true,
        UserChange::LastAdmin => false,
        UserChange::NoSuchUser => panic!("{way:?}: no such user"),
    }
}

async fn the_last_admin_cannot_be_taken_away(database: &Database) {
    let store = database.store().await;
    let admin = sign_up_admin(database, store.as_ref(), "ada").await;
    let user = sign_up_quietly(database, store.as_ref(), "grace").await;
    database.add_role(user.id, "administrator").await;
    log_in(store.as_ref(), &admin).await;
    let before = database.everything().await;
    for way in WAYS {
        assert!(!take_away(store.as_ref(), &admin, way).await, "{way:?}");
        assert_eq!(database.everything().await, before, "{way:?}");
    }
    for way in WAYS {
        let second = sign_up_admin(database, store.as_ref(), &format!("{way:?}")).await;
        assert!(take_away(store.as_ref(), &second, way).await, "{way:?}: there are two");
        assert!(!take_away(store.as_ref(), &admin, way).await, "{way:?}: there is one");
    }
    // Who is no admin is not held back by there being one only.
    for way in [Way::Disable, Way::Delete] {
        assert!(take_away(store.as_ref(), &user, way).await, "{way:?}");
    }
    assert_eq!(database.enabled_admins().await, 1);
}

async fn the_last_admin_may_gain_and_lose_other_roles(database: &Database) {
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
    for way in WAYS {
        let second = sign_up_admin(database, store.as_ref(), &format!("{way:?}")).await;
        assert!(take_away(store.as_ref(), &second, Way::Disable).await);
        assert!(!take_away(store.as_ref(), &admin, way).await, "{way:?}: the other one is disabled");
        // Who is disabled is the last of nobody, and may go.
        if !matches!(way, Way::DeleteByOwner) {
            assert!(take_away(store.as_ref(), &second, way).await, "{way:?}");
        }
    }
    assert_eq!(database.enabled_admins().await, 1);
    // Where there is none to lose, nobody is held back.
    database.set_user(admin.id, "disabled = true").await;
    let user = sign_up_quietly(database, store.as_ref(), "grace").await;
    assert!(take_away(store.as_ref(), &user, Way::Delete).await);
    assert!(take_away(store.as_ref(), &admin, Way::Delete).await);
}

/// Of so many admins each takes away the next, all at once, by all ways; meanwhile they gain and lose other roles,
/// which writes the same rows.
async fn take_each_other_away(database: &Database, count: usize, rounds: usize) {
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
            // All demote each other, then all disable, and so on; then each in another way.
            let way = WAYS[if round % 2 == 0 { round / 2 } else { round / 2 + number } % 4];
            async move { take_away(store.as_ref(), &admin, way).await }
        });
        let refused = all_at_once(steps).await.into_iter().filter(|done| !done).count();
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
                    // Who was demoted before this is an admin again: that there is one left is what counts.
                    store
                        .set_roles(admin.id, roles(&["admin", "busy", "user"]), audit_context())
                        .await
                        .expect("the store");
                } else {
                    take_away(store.as_ref(), &admin, WAYS[round % 4]).await;
                }
            }
        });
        all_at_once(steps).await;
        assert!(database.enabled_admins().await >= 1, "round {round}");
        database.sql.execute("DELETE FROM users").await;
    }
}

async fn of_two_admins_that_take_each_other_away_one_is_left(database: &Database) {
    take_each_other_away(database, 2, 64).await;
}

async fn of_five_admins_that_take_each_other_away_one_is_left(database: &Database) {
    take_each_other_away(database, 5, 32).await;
}

/// What each way does to an admin's rows, stopped before its commit: the other one has to wait for it and to look
/// again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_postgres_an_admin_is_not_taken_away_past_another_that_is_about_to_go() {
    with_database(Engine::Postgres, async |database| {
        let store = database.store().await;
        for goes in [
            "UPDATE users SET disabled = true WHERE id =",
            "DELETE FROM user_roles WHERE role = 'admin' AND user_id =",
            "DELETE FROM users WHERE id =",
        ] {
            for way in WAYS {
                let going = sign_up_admin(database, store.as_ref(), "ada").await;
                let left = sign_up_admin(database, store.as_ref(), "grace").await;
                let rows = "SELECT user_id FROM user_roles WHERE role = 'admin' ORDER BY user_id FOR UPDATE";
                let transaction = begin(database, format!("{rows}; {goes} {}", database.id(going.id.0))).await;
                let taking = tokio::spawn({
                    let store = Arc::clone(&store);
                    async move { take_away(store.as_ref(), &left, way).await }
                });
                assert_waits(database, &taking).await;
                transaction.commit().await.expect("a commit");
                assert!(!taking.await.expect("no panic"), "{goes}, {way:?}");
                database.sql.execute("DELETE FROM users").await;
            }
        }
    })
    .await;
}
