//! Disabling an account and enabling it again: what ends, what stays ended, and what is refused in between.

use std::sync::Arc;

use postern::domain::{
    account::User,
    mail::MailKind,
    one_time::Purpose,
    ports::{
        EmailChangeRequest, EmailConfirmationOutcome, PasswordResetOutcome, RotationOutcome, SessionOpening, UserChange,
    },
};

use crate::{
    fixtures::{
        Token, audit_context, audit_context_by, confirmation_by, email_change, is_alive, log_in, log_out, mail,
        mail_with_token, new_session, password_change, queue_mail, reset_by, sign_up_without_mail, token,
    },
    mail_races::log_in_until_refused,
    parallel::{replicas, stagger},
    support::{Database, on_each_engine},
};

on_each_engine![
    disabling_ends_the_sessions_of_that_account_and_stores_the_reason,
    disabling_voids_reset_and_email_change_tokens,
    a_disabled_account_is_refused_every_step_that_gives_access,
    enabling_allows_logins_again_and_restores_no_session_or_token,
    after_an_acknowledged_disabling_no_session_is_alive,
];

const ROUNDS: usize = 10;

async fn disable(store: &dyn postern::domain::ports::Store, user: &User) -> User {
    match store.disable_user(user.id, None, audit_context()).await.expect("the store") {
        UserChange::Changed(user) => user,
        other => panic!("the account was not disabled: {other:?}"),
    }
}

async fn disabling_ends_the_sessions_of_that_account_and_stores_the_reason(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let other = sign_up_without_mail(database, store.as_ref(), "grace").await;
    let ended = [log_in(store.as_ref(), &user).await, log_in(store.as_ref(), &user).await];
    let before = log_in(store.as_ref(), &user).await;
    log_out(store.as_ref(), &before).await;
    let other_session = log_in(store.as_ref(), &other).await;

    let context = audit_context_by(None);
    let change = store.disable_user(user.id, None, context).await.expect("the store");
    let expected = User { disabled: true, update_time: context.now, ..user.clone() };
    assert_eq!(change, UserChange::Changed(expected.clone()));
    assert_eq!(store.user(user.id).await.expect("the store"), Some(expected.clone()));
    for token in &ended {
        assert_eq!(database.revoke_reason(token).await, "user_disabled");
    }
    assert_eq!(database.revoke_reason(&before).await, "logout", "the session had ended before");
    assert!(is_alive(store.as_ref(), &other_session).await);
    assert_eq!(store.user(other.id).await.expect("the store"), Some(other));

    let everything = database.everything().await;
    let again = store.disable_user(user.id, Some("again".to_owned()), audit_context()).await.expect("the store");
    assert_eq!(again, UserChange::Changed(expected));
    assert_eq!(database.everything().await, everything);
}

async fn disabling_voids_reset_and_email_change_tokens(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let other = sign_up_without_mail(database, store.as_ref(), "grace").await;
    for purpose in [Purpose::ResetPassword, Purpose::ChangeEmail] {
        token(store.as_ref(), &user, purpose).await;
        token(store.as_ref(), &other, purpose).await;
        queue_mail(store.as_ref(), &mail_with_token(&user, purpose)).await;
    }
    queue_mail(store.as_ref(), &mail(MailKind::ResetPassword, user.email.as_str(), None)).await;
    queue_mail(store.as_ref(), &mail(MailKind::ResetPassword, other.email.as_str(), None)).await;
    disable(store.as_ref(), &user).await;
    let expected = ["change_email of new-grace@example.com", "reset_password of grace@example.com"];
    assert_eq!(database.tokens().await, expected);
    assert_eq!(database.outbox().await, ["reset_password to grace@example.com"]);
}

async fn a_disabled_account_is_refused_every_step_that_gives_access(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let user = sign_up_without_mail(database, store, "ada").await;
    let session = log_in(store, &user).await;
    let (reset, change) =
        (token(store, &user, Purpose::ResetPassword).await, token(store, &user, Purpose::ChangeEmail).await);
    disable(store, &user).await;
    let before = database.everything().await;
    assert_eq!(store.open_session(new_session(user.id)).await.expect("the store"), SessionOpening::Refused);
    assert_eq!(store.rotate_refresh(session.rotation()).await.expect("the store"), RotationOutcome::Invalid);
    let outcome = store.reset_password(reset_by(reset)).await.expect("the store");
    assert_eq!(outcome, PasswordResetOutcome::TokenDead);
    let outcome = store.confirm_email_change(confirmation_by(change)).await.expect("the store");
    assert_eq!(outcome, EmailConfirmationOutcome::TokenDead);
    let outcome = store.change_password(password_change(&user)).await.expect("the store");
    assert_eq!(outcome, SessionOpening::Refused);
    let outcome = store.request_email_change(email_change(&user, "new@example.com")).await.expect("the store");
    assert_eq!(outcome, EmailChangeRequest::Refused);
    assert!(!is_alive(store, &session).await);
    assert_eq!(database.everything().await, before);
}

async fn enabling_allows_logins_again_and_restores_no_session_or_token(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let user = sign_up_without_mail(database, store, "ada").await;
    let session = log_in(store, &user).await;
    let reset = token(store, &user, Purpose::ResetPassword).await;
    disable(store, &user).await;
    let context = audit_context_by(None);
    let change = store.enable_user(user.id, context).await.expect("the store");
    let user = User { update_time: context.now, ..user };
    assert_eq!(change, UserChange::Changed(user.clone()));
    let again = store.enable_user(user.id, audit_context()).await.expect("the store");
    assert_eq!(again, UserChange::Changed(user.clone()));

    assert!(!is_alive(store, &session).await);
    assert_eq!(store.rotate_refresh(session.rotation()).await.expect("the store"), RotationOutcome::Invalid);
    let outcome = store.reset_password(reset_by(reset)).await.expect("the store");
    assert_eq!(outcome, PasswordResetOutcome::TokenDead);
    assert_eq!(database.revoke_reason(&session).await, "user_disabled");
    log_in(store, &user).await;
}

async fn after_an_acknowledged_disabling_no_session_is_alive(database: &Database) {
    let stores = replicas(database).await;
    for round in 0..ROUNDS {
        let user = sign_up_without_mail(database, stores[0].as_ref(), &format!("user-{round}")).await;
        let mut logging_in = Vec::new();
        for store in &stores {
            log_in(store.as_ref(), &user).await;
            logging_in.push(tokio::spawn(log_in_until_refused(Arc::clone(store), user.clone())));
        }
        stagger(round * 10).await;
        disable(stores[1].as_ref(), &user).await;
        // From now on no session is open, although logins are still tried.
        assert_eq!(database.sessions_where("revoke_time IS NULL").await, 0, "round {round}");
        for tokens in logging_in {
            let tokens: Vec<Token> = tokens.await.expect("the task did not panic");
            for token in &tokens {
                assert!(!is_alive(stores[0].as_ref(), token).await, "round {round}");
            }
        }
        assert_eq!(database.sessions_where("revoke_time IS NULL").await, 0, "round {round}");
        let (sessions, revocations) = (database.sessions_where("true").await, database.revocations().await);
        assert_eq!(sessions, revocations, "round {round}: each session ended once");
    }
}
