//! Deleting an account: all that is its own goes, and what was told of it stays.

use std::{collections::HashSet, sync::Arc};

use postern::domain::{
    ids::UserId,
    mail::MailKind,
    one_time::Purpose,
    ports::{Revoked, RotationOutcome, SessionOpening, UserChange, UserDeletion, UserDeletionOutcome},
};

use crate::{
    fixtures::{
        audit_context, audit_context_of, deletion, is_alive, log_in, log_out, mail, mail_with_token, new_id,
        new_session, post, roles, sign_up_quietly, token,
    },
    mail_races::log_in_until_refused,
    parallel::{replicas, stagger},
    support::{Database, on_each_engine},
};

on_each_engine![
    all_that_is_an_accounts_own_goes_with_it,
    the_sessions_that_were_open_are_in_the_log,
    who_deletes_by_a_password_needs_the_one_of_now,
    whoever_registers_the_address_again_is_somebody_else,
    nobody_is_deleted,
    a_login_that_meets_a_deletion_comes_before_or_after_it,
];

async fn all_that_is_an_accounts_own_goes_with_it(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let users = [sign_up_quietly(database, store, "grace").await, sign_up_quietly(database, store, "ada").await];
    for user in &users {
        log_in(store, user).await;
        log_out(store, &log_in(store, user).await).await;
        for purpose in Purpose::ALL {
            token(store, user, purpose).await;
        }
    }
    for user in &users {
        for purpose in Purpose::ALL {
            post(store, &mail_with_token(user, purpose)).await;
        }
        for kind in [MailKind::VerifyEmail, MailKind::ResetPassword] {
            post(store, &mail(kind, user.email.as_str(), None)).await;
        }
        post(store, &mail(MailKind::PasswordChanged, user.email.as_str(), Some(user.id))).await;
    }
    let outcome = store.delete_user(deletion(&users[1])).await.expect("the store");
    assert_eq!(outcome, UserDeletionOutcome::Deleted);
    assert_eq!(store.user(users[1].id).await.expect("the store"), None);
    // All that is left is somebody else's, and all of that.
    for (table, count) in [("users", 1), ("user_roles", 1), ("sessions", 2), ("mail_outbox", 6), ("one_time_tokens", 3)]
    {
        assert_eq!(database.rows_of(table).await.len(), count, "{table}");
    }
    assert_eq!(store.user(users[0].id).await.expect("the store"), Some(users[0].clone()));
    assert!(database.outbox().await.iter().all(|mail| mail.contains("grace@")));
    assert!(database.tokens().await.iter().all(|token| token.contains("grace@")));
}

async fn the_sessions_that_were_open_are_in_the_log(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let user = sign_up_quietly(database, store, "ada").await;
    let other = sign_up_quietly(database, store, "grace").await;
    log_in(store, &other).await;
    let ended = log_in(store, &user).await;
    log_out(store, &ended).await;
    let open = [log_in(store, &user).await, log_in(store, &user).await];
    let lines = store.revocations(0, &[]).await.expect("the store");
    let of = audit_context_of(None);
    let outcome = store.delete_user(UserDeletion { context: of, ..deletion(&user) }).await.expect("the store");
    assert_eq!(outcome, UserDeletionOutcome::Deleted);

    let lines = store.revocations(lines[0].number, &[]).await.expect("the store");
    assert_eq!(lines.len(), 2, "{lines:?}");
    for line in &lines {
        assert_eq!(line.retain_until, of.retain_until);
    }
    let ended: HashSet<_> = lines
        .into_iter()
        .map(|line| match line.what {
            Revoked::Session(session) => session,
            Revoked::Roles(..) => panic!("no roles changed"),
        })
        .collect();
    assert_eq!(ended, open.iter().map(|token| token.grant.session_id).collect());
    for token in &open {
        assert!(!is_alive(store, token).await);
        assert_eq!(store.rotate_refresh(token.rotation()).await.expect("the store"), RotationOutcome::Invalid);
    }
}

async fn who_deletes_by_a_password_needs_the_one_of_now(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let user = sign_up_quietly(database, store, "ada").await;
    log_in(store, &user).await;
    database.set_user(user.id, "password_version = 4").await;
    let by = |version| UserDeletion { password_version: Some(version), ..deletion(&user) };
    let before = database.everything().await;
    for version in [3, 5] {
        let outcome = store.delete_user(by(version)).await.expect("the store");
        assert_eq!(outcome, UserDeletionOutcome::Refused);
    }
    assert_eq!(database.everything().await, before);
    database.set_user(user.id, "disabled = true").await;
    let outcome = store.delete_user(by(4)).await.expect("the store");
    assert_eq!(outcome, UserDeletionOutcome::Refused, "disabled meanwhile");
    database.set_user(user.id, "disabled = false").await;
    assert_eq!(store.delete_user(by(4)).await.expect("the store"), UserDeletionOutcome::Deleted);
}

async fn whoever_registers_the_address_again_is_somebody_else(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let before = sign_up_quietly(database, store, "ada").await;
    let session = log_in(store, &before).await;
    token(store, &before, Purpose::VerifyEmail).await;
    store.set_roles(before.id, roles(&["support", "user"]), audit_context()).await.expect("the store");
    store.delete_user(deletion(&before)).await.expect("the store");

    let after = sign_up_quietly(database, store, "ada").await;
    assert_ne!(after.id, before.id);
    assert_eq!((after.roles.clone(), after.email_verified), (roles(&["user"]), false));
    assert!(!is_alive(store, &session).await);
    assert_eq!(store.rotate_refresh(session.rotation()).await.expect("the store"), RotationOutcome::Invalid);
    assert_eq!(store.open_session(new_session(before.id)).await.expect("the store"), SessionOpening::Refused);
    assert_eq!(database.tokens().await, [""; 0]);
    log_in(store, &after).await;
}

async fn nobody_is_deleted(database: &Database) {
    let store = database.store().await;
    let nobody = UserId(new_id());
    let user = sign_up_quietly(database, store.as_ref(), "ada").await;
    for version in [None, Some(0)] {
        let deletion = UserDeletion { user: nobody, password_version: version, ..deletion(&user) };
        assert_eq!(store.delete_user(deletion).await.expect("the store"), UserDeletionOutcome::NoSuchUser);
    }
    assert_eq!(store.disable_user(nobody, None, audit_context()).await.expect("the store"), UserChange::NoSuchUser);
    assert_eq!(store.enable_user(nobody, audit_context()).await.expect("the store"), UserChange::NoSuchUser);
    assert_eq!(store.revoke_user_sessions(nobody, audit_context()).await.expect("the store"), None);
    assert_eq!(store.user(nobody).await.expect("the store"), None);
}

async fn a_login_that_meets_a_deletion_comes_before_or_after_it(database: &Database) {
    let stores = replicas(database).await;
    for round in 0..10 {
        let user = sign_up_quietly(database, stores[0].as_ref(), &format!("user-{round}")).await;
        log_in(stores[0].as_ref(), &user).await;
        let logging_in: Vec<_> =
            stores.iter().map(|store| tokio::spawn(log_in_until_refused(Arc::clone(store), user.clone()))).collect();
        stagger(round * 10).await;
        let before = database.revocations().await;
        let outcome = stores[1].delete_user(deletion(&user)).await.expect("the store");
        assert_eq!(outcome, UserDeletionOutcome::Deleted, "round {round}");
        let mut opened = 1;
        for tokens in logging_in {
            let tokens = tokens.await.expect("no panic");
            let sessions: HashSet<_> = tokens.iter().map(|token| token.grant.session_id).collect();
            opened += i64::try_from(sessions.len()).expect("small");
        }
        assert_eq!(database.sessions_where("true").await, 0, "round {round}");
        assert_eq!(database.revocations().await - before, opened, "round {round}: each ended once");
    }
}
