//! Cancelled calls: a write whose future is dropped still completes. It leaves no transaction open, in which later
//! writes would be acknowledged and lost (transact-rs/sqlx#4385).

use std::{future::poll_fn, pin::pin, sync::Arc, task::Poll};

use futures_util::future::join_all;
use postern::{
    domain::{
        account::User,
        mail::MailKind,
        one_time::{OneTimeGrant, Purpose},
        ports::{AccountCreation, ClaimedMail, MailRetry, SealedSigningKey, Store, UserDeletion},
    },
    error::StoreError,
};
use time::ext::NumericalDuration as _;

use crate::{
    attempts::attempt,
    fixtures::{
        ISSUED, LEASE, NO_LIMIT, NOW, Token, audit_context, claimed, confirmation_by, email_change, log_in, mail,
        mail_with_token, new_account, new_session, password_change, queue_mail, reset_by, roles, sign_up,
        sign_up_without_mail, subject, token, username_change, verification,
    },
    support::{Database, on_each_engine, wait_until},
};

on_each_engine![
    cancelled_writes_leave_no_transaction_open_and_later_writes_are_durable,
    a_cancelled_write_still_completes,
    cancelled_writes_of_mails_and_tokens_leave_no_transaction_open,
    a_cancelled_write_of_mails_or_tokens_still_completes,
    a_cancelled_administrative_write_still_completes,
];

/// How many writes are started. Each kind is cancelled at each of its first waits, several times.
const CANCELLED: usize = 300;
/// A write is cancelled after fewer waits than this.
const WAITS: usize = 6;
/// How many sign-ups are made afterwards and must be durable.
const AFTERWARDS: usize = 100;

/// Drops a future after it has waited `waits` times. Returns whether it completed before that.
async fn cancel_after<T>(waits: usize, future: impl Future<Output = Result<T, StoreError>>) -> bool {
    let mut future = pin!(future);
    let mut remaining = waits;
    poll_fn(|context| match future.as_mut().poll(context) {
        Poll::Ready(outcome) => {
            outcome.map(drop).expect("the store");
            Poll::Ready(true)
        }
        Poll::Pending if remaining == 0 => Poll::Ready(false),
        Poll::Pending => {
            remaining -= 1;
            Poll::Pending
        }
    })
    .await
}

async fn cancel_a_write(store: &dyn Store, token: &Token, number: usize) -> bool {
    let waits = number / 6 % WAITS;
    match number % 6 {
        0 => cancel_after(waits, store.create_account(new_account(&format!("cancelled-{number}")))).await,
        1 => cancel_after(waits, store.open_session(new_session(token.grant.user_id))).await,
        2 => cancel_after(waits, store.rotate_refresh(token.rotation())).await,
        3 => cancel_after(waits, store.logout(token.logout_everywhere())).await,
        4 => cancel_after(waits, store.purge_sessions(ISSUED, 10)).await,
        _ => {
            let key = SealedSigningKey {
                kid: number.to_string(),
                algorithm: "ES256".to_owned(),
                sealed_private_key: Vec::new(),
                create_time: NOW,
                sign_time: None,
                publish_ahead: None,
            };
            cancel_after(waits, store.add_first_signing_key(key)).await
        }
    }
}

async fn cancelled_writes_leave_no_transaction_open_and_later_writes_are_durable(database: &Database) {
    let store = database.store().await;
    let user = sign_up(store.as_ref(), "ada").await;
    let token = log_in(store.as_ref(), &user).await;
    let mut cancelled = 0;
    for number in (0..CANCELLED).step_by(4) {
        // Four run concurrently, so that more than one connection is in use.
        let batch = (number..number + 4).map(|number| cancel_a_write(store.as_ref(), &token, number));
        cancelled += join_all(batch).await.into_iter().filter(|completed| !completed).count();
    }
    assert!(cancelled >= CANCELLED / WAITS / 2, "only {cancelled} writes were cancelled, too few for this test");
    database.assert_at_rest().await;

    for number in (0..AFTERWARDS).step_by(20) {
        let sign_ups = (number..number + 20).map(|number| {
            let store = Arc::clone(&store);
            async move { store.create_account(new_account(&format!("later-{number}"))).await.expect("the store") }
        });
        for creation in join_all(sign_ups).await {
            assert!(matches!(creation, AccountCreation::Created(_)), "{creation:?}");
        }
    }
    let durable = database.sql.number("SELECT count(*) FROM users WHERE username LIKE 'later-%'").await;
    assert_eq!(
        durable,
        i64::try_from(AFTERWARDS).expect("the number fits"),
        "every acknowledged sign-up is visible to another connection"
    );
}

async fn a_cancelled_write_still_completes(database: &Database) {
    let store = database.store().await;
    let mut cancelled = 0;
    for number in 0..20 {
        let completed = cancel_after(0, store.create_account(new_account(&format!("cancelled-{number}")))).await;
        // A thread that is interrupted at the right moment finds the write done at its first poll.
        cancelled += usize::from(!completed);
    }
    assert!(cancelled > 10, "only {cancelled} writes were cancelled");
    wait_until("every cancelled sign-up is committed", async || {
        (database.sql.number("SELECT count(*) FROM users").await == 20).then_some(())
    })
    .await;
}

/// An account with a live token for each purpose and a claimed mail.
struct Account {
    user: User,
    tokens: Vec<OneTimeGrant>,
    mail: ClaimedMail,
}

impl Account {
    async fn create(database: &Database, store: &dyn Store, name: &str) -> Self {
        let user = sign_up_without_mail(database, store, name).await;
        let mut tokens = Vec::new();
        for purpose in Purpose::ALL {
            tokens.push(token(store, &user, purpose).await);
        }
        queue_mail(store, &mail(MailKind::AccountExists, user.email.as_str(), None)).await;
        let mail = claimed(store).await;
        Self { user, tokens, mail }
    }
}

/// How many writes of mails and tokens there are.
const MAIL_WRITES: usize = 11;

async fn cancel_a_mail_write(store: &dyn Store, account: &Account, write: usize, waits: usize) -> bool {
    let Account { user, tokens, mail: claimed } = account;
    match write {
        0 => cancel_after(waits, store.verify_email(verification(tokens[0].clone(), audit_context()))).await,
        1 => cancel_after(waits, store.reset_password(reset_by(tokens[1].clone()))).await,
        2 => cancel_after(waits, store.confirm_email_change(confirmation_by(tokens[2].clone()))).await,
        3 => cancel_after(waits, store.change_password(password_change(user))).await,
        4 => {
            let new = format!("newer-{}", user.email.as_str());
            cancel_after(waits, store.request_email_change(email_change(user, &new))).await
        }
        5 => {
            let mail = mail(MailKind::ResetPassword, user.email.as_str(), None);
            cancel_after(waits, store.request_mail(mail, NO_LIMIT)).await
        }
        6 => cancel_after(waits, store.claim_mail(NOW, LEASE)).await,
        7 => cancel_after(waits, store.mail_sent(claimed.id, claimed.attempt)).await,
        8 => cancel_after(waits, store.mail_failed(claimed.id, claimed.attempt, MailRetry::Never, NOW)).await,
        9 => cancel_after(waits, store.purge_mail(NOW + 1.hours(), NOW, 1_000)).await,
        10 => {
            let new = format!("newer-{}", user.username.as_str());
            cancel_after(waits, store.change_username(username_change(user, &new))).await
        }
        _ => panic!("there is no write with this number"),
    }
}

async fn cancelled_writes_of_mails_and_tokens_leave_no_transaction_open(database: &Database) {
    let store = database.store().await;
    let mut cancelled = 0;
    for waits in 0..WAITS {
        let mut accounts = Vec::new();
        for number in 0..MAIL_WRITES {
            accounts.push(Account::create(database, store.as_ref(), &format!("user-{waits}-{number}")).await);
        }
        // A mail must be due. All writes run concurrently, so that more than one connection is in use.
        database.age_mails(LEASE).await;
        let writes = accounts.iter().enumerate().map(|(write, account)| {
            let store = store.as_ref();
            async move { cancel_a_mail_write(store, account, write, waits).await }
        });
        cancelled += join_all(writes).await.into_iter().filter(|completed| !completed).count();
        database.assert_at_rest().await;
        sign_up(store.as_ref(), &format!("later-{waits}")).await;
    }
    assert!(cancelled >= WAITS, "only {cancelled} writes were cancelled, too few for this test");
    let durable = database.sql.number("SELECT count(*) FROM users WHERE username LIKE 'later-%'").await;
    assert_eq!(
        durable,
        i64::try_from(WAITS).expect("the number fits"),
        "every acknowledged sign-up is visible to another connection"
    );
}

async fn a_cancelled_write_of_mails_or_tokens_still_completes(database: &Database) {
    let store = database.store().await;
    let mut cancelled = 0;
    for write in 0..MAIL_WRITES {
        database.sql.execute("DELETE FROM mail_outbox").await;
        let account = Account::create(database, store.as_ref(), &format!("user-{write}")).await;
        if write == 6 {
            // A claim is committed once its token is stored.
            database.sql.execute("DELETE FROM one_time_tokens").await;
            queue_mail(store.as_ref(), &mail_with_token(&account.user, Purpose::ResetPassword)).await;
        }
        let written = async || match write {
            6 => database.tokens().await.concat(),
            // A purge is committed once the limits are deleted.
            9 => database.sql.number("SELECT count(*) FROM mail_limits").await.to_string(),
            _ => database.everything().await,
        };
        let before = written().await;
        let completed = cancel_a_mail_write(store.as_ref(), &account, write, 0).await;
        // A thread that is interrupted at the right moment finds the write done at its first poll.
        cancelled += usize::from(!completed);
        wait_until("the cancelled write is committed", async || (written().await != before).then_some(())).await;
        database.assert_at_rest().await;
    }
    assert!(cancelled > MAIL_WRITES / 2, "only {cancelled} writes were cancelled");
}

async fn cancel_an_administrative_write(store: &dyn Store, token: &Token, write: usize) -> bool {
    let (user, attempt) = (token.grant.user_id, attempt(subject("ada@example.com")));
    match write {
        0 => cancel_after(0, store.reserve_attempt(attempt)).await,
        1 => cancel_after(0, store.attempt_succeeded(attempt.subject)).await,
        2 => cancel_after(0, store.attempt_failed(attempt, None, audit_context())).await,
        3 => cancel_after(0, store.set_roles(user, roles(&["support", "user"]), audit_context())).await,
        4 => cancel_after(0, store.revoke_session(token.grant.session_id, user, audit_context())).await,
        5 => cancel_after(0, store.revoke_user_sessions(user, audit_context())).await,
        6 => cancel_after(0, store.disable_user(user, None, audit_context())).await,
        7 => cancel_after(0, store.enable_user(user, audit_context())).await,
        8 => {
            let deletion = UserDeletion { user, password_version: None, context: audit_context() };
            cancel_after(0, store.delete_user(deletion)).await
        }
        9 => cancel_after(0, store.purge_revocations(NOW + 1.hours(), i64::MAX, 100)).await,
        10 => cancel_after(0, store.purge_audit_events(NOW + 1.hours(), 100)).await,
        _ => panic!("there is no write with this number"),
    }
}

async fn a_cancelled_administrative_write_still_completes(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let token = log_in(store.as_ref(), &user).await;
    let mut cancelled = 0;
    for write in 0..=10 {
        let before = database.everything().await;
        let completed = cancel_an_administrative_write(store.as_ref(), &token, write).await;
        // A thread that is interrupted at the right moment finds the write done at its first poll.
        cancelled += usize::from(!completed);
        wait_until("the cancelled write is committed", async || (database.everything().await != before).then_some(()))
            .await;
        database.assert_at_rest().await;
    }
    assert!(cancelled > 5, "only {cancelled} writes were cancelled");
}
