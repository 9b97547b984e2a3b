//! Callers that go away: a write whose future is dropped ends all the same, and leaves no transaction open in which
//! later writes would be acknowledged and lost (transact-rs/sqlx#4385).

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
        mail_with_token, new_account, new_session, password_change, post, reset_by, roles, sign_up, sign_up_quietly,
        subject, token,
    },
    support::{Database, on_each_engine, wait_until},
};

on_each_engine![
    abandoned_writes_leave_no_transaction_open_and_later_ones_are_durable,
    an_abandoned_write_is_made_all_the_same,
    abandoned_writes_of_mails_and_tokens_leave_no_transaction_open,
    an_abandoned_write_of_mails_or_tokens_is_made_all_the_same,
    an_abandoned_write_of_administration_is_made_all_the_same,
];

/// How many writes are abandoned: each kind at each of its first waits, many times over.
const ABANDONED: usize = 600;
/// How many waits of a write are gone through before it is abandoned, at most.
const WAITS: usize = 12;
/// How many sign-ups have to be durable afterwards.
const AFTERWARDS: usize = 100;

/// Lets a future wait so many times, then drops it. Whether it came to its end before.
async fn abandon_after<T>(waits: usize, future: impl Future<Output = Result<T, StoreError>>) -> bool {
    let mut future = pin!(future);
    let mut left = waits;
    poll_fn(|context| match future.as_mut().poll(context) {
        Poll::Ready(outcome) => {
            outcome.map(drop).expect("the store");
            Poll::Ready(true)
        }
        Poll::Pending if left == 0 => Poll::Ready(false),
        Poll::Pending => {
            left -= 1;
            Poll::Pending
        }
    })
    .await
}

async fn abandon_a_write(store: &dyn Store, token: &Token, number: usize) -> bool {
    let waits = number / 6 % WAITS;
    match number % 6 {
        0 => abandon_after(waits, store.create_account(new_account(&format!("abandoned-{number}")))).await,
        1 => abandon_after(waits, store.open_session(new_session(token.grant.user_id))).await,
        2 => abandon_after(waits, store.rotate_refresh(token.rotation())).await,
        3 => abandon_after(waits, store.logout(token.logout_everywhere())).await,
        4 => abandon_after(waits, store.purge_sessions(ISSUED, 10)).await,
        _ => {
            let key = SealedSigningKey {
                kid: number.to_string(),
                algorithm: "ES256".to_owned(),
                sealed_private_key: Vec::new(),
                create_time: NOW,
            };
            abandon_after(waits, store.add_first_signing_key(key)).await
        }
    }
}

async fn abandoned_writes_leave_no_transaction_open_and_later_ones_are_durable(database: &Database) {
    let store = database.store().await;
    let user = sign_up(store.as_ref(), "ada").await;
    let token = log_in(store.as_ref(), &user).await;
    let mut abandoned = 0;
    for number in (0..ABANDONED).step_by(4) {
        // Four at once, so that more than one connection is in use.
        let batch = (number..number + 4).map(|number| abandon_a_write(store.as_ref(), &token, number));
        abandoned += join_all(batch).await.into_iter().filter(|ended| !ended).count();
    }
    assert!(abandoned >= ABANDONED / WAITS / 2, "only {abandoned} writes were abandoned: this test tests nothing");
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
    assert_eq!(durable, i64::try_from(AFTERWARDS).expect("small"), "acknowledged, and seen from another connection");
}

async fn an_abandoned_write_is_made_all_the_same(database: &Database) {
    let store = database.store().await;
    for number in 0..20 {
        let ended = abandon_after(0, store.create_account(new_account(&format!("abandoned-{number}")))).await;
        assert!(!ended, "a write takes longer than its first poll");
    }
    wait_until("every abandoned sign-up is there", async || {
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
    async fn make(database: &Database, store: &dyn Store, name: &str) -> Self {
        let user = sign_up_quietly(database, store, name).await;
        let mut tokens = Vec::new();
        for purpose in Purpose::ALL {
            tokens.push(token(store, &user, purpose).await);
        }
        post(store, &mail(MailKind::AccountExists, user.email.as_str(), None)).await;
        let mail = claimed(store).await;
        Self { user, tokens, mail }
    }
}

/// How many writes of mails and tokens there are.
const MAIL_WRITES: usize = 10;

async fn abandon_a_mail_write(store: &dyn Store, of: &Account, write: usize, waits: usize) -> bool {
    let Account { user, tokens, mail: claimed } = of;
    match write {
        0 => abandon_after(waits, store.verify_email(tokens[0].clone(), audit_context())).await,
        1 => abandon_after(waits, store.reset_password(reset_by(tokens[1].clone()))).await,
        2 => abandon_after(waits, store.confirm_email_change(confirmation_by(tokens[2].clone()))).await,
        3 => abandon_after(waits, store.change_password(password_change(user))).await,
        4 => {
            let new = format!("newer-{}", user.email.as_str());
            abandon_after(waits, store.request_email_change(email_change(user, &new))).await
        }
        5 => {
            let mail = mail(MailKind::ResetPassword, user.email.as_str(), None);
            abandon_after(waits, store.request_mail(mail, NO_LIMIT)).await
        }
        6 => abandon_after(waits, store.claim_mail(NOW, LEASE)).await,
        7 => abandon_after(waits, store.mail_sent(claimed.id, claimed.attempt)).await,
        8 => abandon_after(waits, store.mail_failed(claimed.id, claimed.attempt, MailRetry::Never, NOW)).await,
        9 => abandon_after(waits, store.purge_mail(NOW + 1.hours(), NOW)).await,
        _ => panic!("no such write"),
    }
}

async fn abandoned_writes_of_mails_and_tokens_leave_no_transaction_open(database: &Database) {
    let store = database.store().await;
    let mut abandoned = 0;
    for waits in 0..WAITS {
        let mut accounts = Vec::new();
        for number in 0..MAIL_WRITES {
            accounts.push(Account::make(database, store.as_ref(), &format!("user-{waits}-{number}")).await);
        }
        // One has to be due; and all at once, so that more than one connection is in use.
        database.age_mails(LEASE).await;
        let writes = accounts.iter().enumerate().map(|(write, account)| {
            let store = store.as_ref();
            async move { abandon_a_mail_write(store, account, write, waits).await }
        });
        abandoned += join_all(writes).await.into_iter().filter(|ended| !ended).count();
        database.assert_at_rest().await;
        sign_up(store.as_ref(), &format!("later-{waits}")).await;
    }
    assert!(abandoned >= WAITS, "only {abandoned} writes were abandoned: this test tests nothing");
    let durable = database.sql.number("SELECT count(*) FROM users WHERE username LIKE 'later-%'").await;
    assert_eq!(durable, i64::try_from(WAITS).expect("small"), "acknowledged, and seen from another connection");
}

async fn an_abandoned_write_of_mails_or_tokens_is_made_all_the_same(database: &Database) {
    let store = database.store().await;
    for write in 0..MAIL_WRITES {
        database.sql.execute("DELETE FROM mail_outbox").await;
        let account = Account::make(database, store.as_ref(), &format!("user-{write}")).await;
        if write == 6 {
            // All of a claim is there once its token is.
            database.sql.execute("DELETE FROM one_time_tokens").await;
            post(store.as_ref(), &mail_with_token(&account.user, Purpose::ResetPassword)).await;
        }
        let written = async || match write {
            6 => database.tokens().await.concat(),
            // And of forgetting, once the limits are gone.
            9 => database.sql.number("SELECT count(*) FROM mail_limits").await.to_string(),
            _ => database.everything().await,
        };
        let before = written().await;
        let ended = abandon_a_mail_write(store.as_ref(), &account, write, 0).await;
        assert!(!ended, "write {write} takes longer than its first poll");
        wait_until("the abandoned write is there", async || (written().await != before).then_some(())).await;
        database.assert_at_rest().await;
    }
}

async fn abandon_an_administrative_write(store: &dyn Store, of: &Token, write: usize) -> bool {
    let (user, attempt) = (of.grant.user_id, attempt(subject("ada@example.com")));
    match write {
        0 => abandon_after(0, store.reserve_attempt(attempt)).await,
        1 => abandon_after(0, store.attempt_succeeded(attempt.subject)).await,
        2 => abandon_after(0, store.login_failed(None, audit_context())).await,
        3 => abandon_after(0, store.set_roles(user, roles(&["support", "user"]), audit_context())).await,
        4 => abandon_after(0, store.revoke_session(of.grant.session_id, user, audit_context())).await,
        5 => abandon_after(0, store.revoke_user_sessions(user, audit_context())).await,
        6 => abandon_after(0, store.disable_user(user, None, audit_context())).await,
        7 => abandon_after(0, store.enable_user(user, audit_context())).await,
        8 => {
            let deletion = UserDeletion { user, password_version: None, context: audit_context() };
            abandon_after(0, store.delete_user(deletion)).await
        }
        9 => abandon_after(0, store.purge_revocations(NOW + 1.hours())).await,
        10 => abandon_after(0, store.purge_audit_events(NOW + 1.hours(), 100)).await,
        _ => panic!("no such write"),
    }
}

async fn an_abandoned_write_of_administration_is_made_all_the_same(database: &Database) {
    let store = database.store().await;
    let user = sign_up_quietly(database, store.as_ref(), "ada").await;
    let token = log_in(store.as_ref(), &user).await;
    for write in 0..=10 {
        let before = database.everything().await;
        let ended = abandon_an_administrative_write(store.as_ref(), &token, write).await;
        assert!(!ended, "write {write} takes longer than its first poll");
        wait_until("the abandoned write is there", async || (database.everything().await != before).then_some(()))
            .await;
        database.assert_at_rest().await;
    }
}
