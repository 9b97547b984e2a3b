//! Deleting an account: everything that belongs to it is deleted, and its audit rows remain.

use std::{collections::HashSet, sync::Arc};

use postern::domain::{
    ids::UserId,
    mail::MailKind,
    one_time::Purpose,
    ports::{Revoked, RotationOutcome, SessionOpening, UserChange, UserDeletion, UserDeletionOutcome},
};

use crate::{
    fixtures::{
        audit_context, audit_context_by, deletion, is_alive, log_in, log_out, mail, mail_with_token, new_id,
        new_session, queue_mail, roles, sign_up_without_mail, token,
    },
    mail_races::log_in_until_refused,
    parallel::{replicas, stagger},
    support::{Database, on_each_engine},
};

on_each_engine![
    deleting_an_account_deletes_everything_that_belongs_to_it,
    deleting_an_account_logs_the_revocation_of_its_open_sessions,
    deleting_by_password_requires_the_current_password,
    a_new_account_with_a_deleted_accounts_address_is_another_account,
    an_unknown_account_is_reported,
    a_login_concurrent_with_a_deletion_happens_before_or_after_it,
];

async fn deleting_an_account_deletes_everything_that_belongs_to_it(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let users =
        [sign_up_without_mail(database, store, "grace").await, sign_up_without_mail(database, store, "ada").await];
    for user in &users {
        log_in(store, user).await;
        log_out(store, &log_in(store, user).await).await;
        for purpose in Purpose::ALL {
            token(store, user, purpose).await;
        }
    }
    for user in &users {
        for purpose in Purpose::ALL {
            queue_mail(store, &mail_with_token(user, purpose)).await;
        }
        for kind in [MailKind::VerifyEmail, MailKind::ResetPassword] {
            queue_mail(store, &mail(kind, user.email.as_str(), None)).await;
        }
        queue_mail(store, &mail(MailKind::PasswordChanged, user.email.as_str(), Some(user.id))).await;
    }
    let outcome = store.delete_user(deletion(&users[1])).await.expect("the store");
    assert_eq!(outcome, UserDeletionOutcome::Deleted);
    assert_eq!(store.user(users[1].id).await.expect("the store"), None);
    // Everything of the other account remains, and nothing else.
    for (table, count) in [("users", 1), ("user_roles", 1), ("sessions", 2), ("mail_outbox", 6), ("one_time_tokens", 3)]
    {
        assert_eq!(database.rows_of(table).await.len(), count, "{table}");
    }
    assert_eq!(store.user(users[0].id).await.expect("the store"), Some(users[0].clone()));
    assert!(database.outbox().await.iter().all(|mail| mail.contains("grace@")));
    assert!(database.tokens().await.iter().all(|token| token.contains("grace@")));
}

async fn deleting_an_account_logs_the_revocation_of_its_open_sessions(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let user = sign_up_without_mail(database, store, "ada").await;
    let other = sign_up_without_mail(database, store, "grace").await;
    log_in(store, &other).await;
    let ended = log_in(store, &user).await;
    log_out(store, &ended).await;
    let open = [log_in(store, &user).await, log_in(store, &user).await];
    let entries = store.revocations(0, &[]).await.expect("the store");
    let context = audit_context_by(None);
    let outcome = store.delete_user(UserDeletion { context, ..deletion(&user) }).await.expect("the store");
    assert_eq!(outcome, UserDeletionOutcome::Deleted);

    let mut entries = store.revocations(entries[0].number, &[]).await.expect("the store");
    let of_the_account = entries.pop().expect("an entry");
    assert_eq!(of_the_account.what, Revoked::Roles(user.id, None), "no token of the account is valid");
    assert_eq!(entries.len(), 2, "{entries:?}");
    for entry in &entries {
        assert_eq!(entry.retain_until, context.retain_until);
    }
    let ended: HashSet<_> = entries
        .into_iter()
        .map(|entry| match entry.what {
            Revoked::Session(session) => session,
            Revoked::Roles(..) => panic!("no roles were changed"),
        })
        .collect();
    assert_eq!(ended, open.iter().map(|token| token.grant.session_id).collect());
    for token in &open {
        assert!(!is_alive(store, token).await);
        assert_eq!(store.rotate_refresh(token.rotation()).await.expect("the store"), RotationOutcome::Invalid);
    }
}

async fn deleting_by_password_requires_the_current_password(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let user = sign_up_without_mail(database, store, "ada").await;
    log_in(store, &user).await;
    database.set_user(user.id, "password_version = 4").await;
    let by_password = |version| UserDeletion { password_version: Some(version), ..deletion(&user) };
    let before = database.everything().await;
    for version in [3, 5] {
        let outcome = store.delete_user(by_password(version)).await.expect("the store");
        assert_eq!(outcome, UserDeletionOutcome::Refused);
    }
    assert_eq!(database.everything().await, before);
    database.set_user(user.id, "disabled = true").await;
    let outcome = store.delete_user(by_password(4)).await.expect("the store");
    assert_eq!(outcome, UserDeletionOutcome::Refused, "the account was disabled meanwhile");
    database.set_user(user.id, "disabled = false").await;
    assert_eq!(store.delete_user(by_password(4)).await.expect("the store"), UserDeletionOutcome::Deleted);
}

async fn a_new_account_with_a_deleted_accounts_address_is_another_account(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let before = sign_up_without_mail(database, store, "ada").await;
    let session = log_in(store, &before).await;
    token(store, &before, Purpose::VerifyEmail).await;
    store.set_roles(before.id, roles(&["support", "user"]), audit_context()).await.expect("the store");
    store.delete_user(deletion(&before)).await.expect("the store");

    let after = sign_up_without_mail(database, store, "ada").await;
    assert_ne!(after.id, before.id);
    assert_eq!((after.roles.clone(), after.email_verified), (roles(&["user"]), false));
    assert!(!is_alive(store, &session).await);
    assert_eq!(store.rotate_refresh(session.rotation()).await.expect("the store"), RotationOutcome::Invalid);
    assert_eq!(store.open_session(new_session(before.id)).await.expect("the store"), SessionOpening::Refused);
    assert_eq!(database.tokens().await, [""; 0]);
    log_in(store, &after).await;
}

async fn an_unknown_account_is_reported(database: &Database) {
    let store = database.store().await;
    let unknown = UserId(new_id());
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    for version in [None, Some(0)] {
        let deletion = UserDeletion { user: unknown, password_version: version, ..deletion(&user) };
        assert_eq!(store.delete_user(deletion).await.expect("the store"), UserDeletionOutcome::NoSuchUser);
    }
    assert_eq!(store.disable_user(unknown, None, audit_context()).await.expect("the store"), UserChange::NoSuchUser);
    assert_eq!(store.enable_user(unknown, audit_context()).await.expect("the store"), UserChange::NoSuchUser);
    assert_eq!(store.revoke_user_sessions(unknown, audit_context()).await.expect("the store"), None);
    assert_eq!(store.user(unknown).await.expect("the store"), None);
}

async fn a_login_concurrent_with_a_deletion_happens_before_or_after_it(database: &Database) {
    let stores = replicas(database).await;
    for round in 0..10 {
        let user = sign_up_without_mail(database, stores[0].as_ref(), &format!("user-{round}")).await;
        log_in(stores[0].as_ref(), &user).await;
        let logging_in: Vec<_> =
            stores.iter().map(|store| tokio::spawn(log_in_until_refused(Arc::clone(store), user.clone()))).collect();
        stagger(round * 10).await;
        let before = database.revocations().await;
        let outcome = stores[1].delete_user(deletion(&user)).await.expect("the store");
        assert_eq!(outcome, UserDeletionOutcome::Deleted, "round {round}");
        let mut opened = 1;
        for tokens in logging_in {
            let tokens = tokens.await.expect("the task did not panic");
            let sessions: HashSet<_> = tokens.iter().map(|token| token.grant.session_id).collect();
            opened += i64::try_from(sessions.len()).expect("the number fits");
        }
        assert_eq!(database.sessions_where("true").await, 0, "round {round}");
        assert_eq!(database.revocations().await - before, opened, "round {round}: each session ended once");
    }
}
