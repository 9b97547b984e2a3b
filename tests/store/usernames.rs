//! Changing the username of an account.

use std::sync::Arc;

use postern::domain::{
    account::User,
    ids::UserId,
    ports::{Logout, Store, UsernameChange, UsernameChangeOutcome},
};
use time::ext::NumericalDuration as _;

use crate::{
    fixtures::{NOW, audit_context_at, log_in, new_id, sign_up_without_mail, username_change},
    parallel::{all_at_once, replicas},
    support::{Database, on_each_engine},
};

on_each_engine![
    a_change_of_username_changes_nothing_else,
    a_username_of_another_account_is_taken_in_any_case,
    a_change_of_username_is_refused_if_the_account_has_changed_since,
    of_accounts_that_change_to_one_username_one_gets_it,
];

async fn change(store: &dyn Store, change: UsernameChange) -> UsernameChangeOutcome {
    store.change_username(change).await.expect("the store")
}

async fn a_change_of_username_changes_nothing_else(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let session = log_in(store.as_ref(), &user).await;
    for new in ["Lovelace", "LOVELACE", "ada"] {
        let now = NOW + 1.minutes();
        let asked = UsernameChange { context: audit_context_at(now), ..username_change(&user, new) };
        let expected = User { username: asked.username.clone(), update_time: now, ..user.clone() };
        assert_eq!(change(store.as_ref(), asked).await, UsernameChangeOutcome::Changed(expected.clone()));
        assert_eq!(store.user(user.id).await.expect("the store"), Some(expected));
    }
    assert!(!database.is_revoked(&session).await);
    assert_eq!(database.outbox().await, Vec::<String>::new());
}

async fn assert_unchanged(
    database: &Database,
    store: &dyn Store,
    asked: UsernameChange,
    outcome: UsernameChangeOutcome,
) {
    let before = database.everything().await;
    assert_eq!(change(store, asked).await, outcome);
    assert_eq!(database.everything().await, before);
}

async fn a_username_of_another_account_is_taken_in_any_case(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    sign_up_without_mail(database, store.as_ref(), "Grace").await;
    for taken in ["Grace", "grace", "GRACE"] {
        let asked = username_change(&user, taken);
        assert_unchanged(database, store.as_ref(), asked, UsernameChangeOutcome::UsernameTaken).await;
    }
}

async fn a_change_of_username_is_refused_if_the_account_has_changed_since(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    sign_up_without_mail(database, store.as_ref(), "grace").await;
    let unknown = User { id: UserId(new_id()), ..user.clone() };
    for (assignment, account) in
        [("password_version = 1", &user), ("disabled = true", &user), ("disabled = false", &unknown)]
    {
        database.set_user(user.id, "password_version = 0, disabled = false").await;
        database.set_user(user.id, assignment).await;
        for new in ["lovelace", "grace"] {
            let asked = username_change(account, new);
            assert_unchanged(database, store.as_ref(), asked, UsernameChangeOutcome::Refused).await;
        }
    }
    database.set_user(user.id, "password_version = 0, disabled = false").await;
    let session = log_in(store.as_ref(), &user).await;
    store.logout(Logout { everywhere: true, ..session.logout() }).await.expect("the store");
    let asked = UsernameChange { caller: session.grant.session_id, ..username_change(&user, "lovelace") };
    assert_unchanged(database, store.as_ref(), asked, UsernameChangeOutcome::Refused).await;
}

async fn of_accounts_that_change_to_one_username_one_gets_it(database: &Database) {
    let stores = replicas(database).await;
    for round in 0..10 {
        let mut users = Vec::new();
        for number in 0..4 {
            users.push(sign_up_without_mail(database, stores[0].as_ref(), &format!("user-{round}-{number}")).await);
        }
        let new = [format!("new-{round}"), format!("NEW-{round}")];
        let steps = users.iter().enumerate().map(|(number, user)| {
            let (store, asked) = (Arc::clone(&stores[number % 2]), username_change(user, &new[number / 2]));
            async move { store.change_username(asked).await.expect("the store") }
        });
        let outcomes = all_at_once(steps).await;
        let taken = outcomes.iter().filter(|outcome| **outcome == UsernameChangeOutcome::UsernameTaken).count();
        let changed = outcomes.iter().filter(|outcome| matches!(outcome, UsernameChangeOutcome::Changed(_))).count();
        assert_eq!((changed, taken), (1, 3), "round {round}: {outcomes:?}");
    }
}
