//! Signing keys, and pings.

use std::sync::Arc;

use futures_util::future::join_all;
use postern::domain::ports::SealedSigningKey;

use crate::{
    fixtures::NOW,
    support::{Database, on_each_engine},
};

on_each_engine![
    a_signing_key_reads_back_as_it_was_written,
    of_eight_concurrent_first_keys_one_is_stored,
    a_second_first_key_is_not_stored,
    a_reachable_store_answers_pings,
];

fn key(kid: &str) -> SealedSigningKey {
    SealedSigningKey {
        kid: kid.to_owned(),
        algorithm: "ES256".to_owned(),
        sealed_private_key: vec![0, 1, 0xff, 0, b'\'', b'\\'],
        create_time: NOW,
    }
}

async fn a_signing_key_reads_back_as_it_was_written(database: &Database) {
    let store = database.store().await;
    assert_eq!(store.signing_keys().await.expect("the store"), []);
    store.add_first_signing_key(key("a")).await.expect("the store");
    assert_eq!(store.signing_keys().await.expect("the store"), [key("a")]);
}

async fn of_eight_concurrent_first_keys_one_is_stored(database: &Database) {
    // Two replicas on PostgreSQL; two stores of one process on SQLite.
    let stores = [database.store().await, database.store().await];
    for _ in 0..20 {
        let steps = (0..8).map(|number| {
            let store = Arc::clone(&stores[number % 2]);
            tokio::spawn(async move {
                store.add_first_signing_key(key(&number.to_string())).await.expect("the store");
                store.signing_keys().await.expect("the store")
            })
        });
        let found: Vec<_> =
            join_all(steps).await.into_iter().map(|seen| seen.expect("the task did not panic")).collect();
        assert_eq!(found[0].len(), 1, "{found:?}");
        assert!(found.iter().all(|keys| *keys == found[0]), "every caller reads the same key: {found:?}");
        database.sql.execute("DELETE FROM signing_keys").await;
    }
}

async fn a_second_first_key_is_not_stored(database: &Database) {
    let store = database.store().await;
    store.add_first_signing_key(key("a")).await.expect("the store");
    store.add_first_signing_key(key("b")).await.expect("the store");
    store.add_first_signing_key(SealedSigningKey { sealed_private_key: vec![7], ..key("a") }).await.expect("the store");
    assert_eq!(store.signing_keys().await.expect("the store"), [key("a")]);
}

async fn a_reachable_store_answers_pings(database: &Database) {
    let store = database.store().await;
    for _ in 0..3 {
        store.ping().await.expect("an answer");
    }
}
