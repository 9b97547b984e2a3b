//! Callers that go away: a write whose future is dropped ends all the same, and leaves no transaction open in which
//! later writes would be acknowledged and lost (transact-rs/sqlx#4385).

use std::{future::poll_fn, pin::pin, sync::Arc, task::Poll};

use futures_util::future::join_all;
use postern::{
    domain::keyring::SealedSigningKey,
    store::{AccountCreation, Store, StoreError},
};

use crate::{
    fixtures::{ISSUED, NOW, Token, log_in, new_account, new_session, sign_up},
    support::{Database, on_each_engine, wait_until},
};

on_each_engine![
    abandoned_writes_leave_no_transaction_open_and_later_ones_are_durable,
    an_abandoned_write_is_made_all_the_same,
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
        4 => abandon_after(waits, store.forget_ended_sessions(ISSUED, 10)).await,
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
