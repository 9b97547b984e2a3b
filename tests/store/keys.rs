//! Signing keys, and pings.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;
use postern::{
    domain::{
        audit::Action,
        env::Env,
        ports::{KeyChange, KeyEdit, Revoked, SealedSigningKey, Store},
        signing_key::revocation_id,
    },
    store::{self, Migrate},
};
use time::ext::NumericalDuration as _;

use crate::{
    fixtures::{NOW, audit, audit_context},
    support::{Database, on_each_engine},
};

on_each_engine![
    a_signing_key_reads_back_as_it_was_written,
    of_eight_concurrent_first_keys_one_is_stored,
    a_second_first_key_is_not_stored,
    each_edit_changes_its_key_and_no_other,
    a_change_that_was_decided_from_other_keys_changes_nothing,
    of_eight_concurrent_next_keys_one_is_stored,
    a_revoked_key_is_in_the_log_of_revocations,
    a_key_of_a_release_without_rotation_is_read_as_such,
    the_key_of_a_release_without_rotation_is_as_good_as_new_after_the_upgrade,
    a_reachable_store_answers_pings,
];

fn key(kid: &str) -> SealedSigningKey {
    SealedSigningKey {
        kid: kid.to_owned(),
        algorithm: "ES256".to_owned(),
        sealed_private_key: vec![0, 1, 0xff, 0, b'\'', b'\\'],
        create_time: NOW,
        sign_time: Some(NOW + 1.microseconds()),
        publish_ahead: Some(Duration::from_hours(24)),
    }
}

async fn keys(store: &dyn Store) -> Vec<SealedSigningKey> {
    let mut keys = store.signing_keys().await.expect("the store");
    keys.sort_by(|a, b| a.kid.cmp(&b.kid));
    keys
}

/// A change that was decided from these keys.
fn change(expected: Vec<SealedSigningKey>, edit: KeyEdit) -> KeyChange {
    KeyChange { expected, edits: vec![edit], event: None, context: audit_context() }
}

/// Changes the keys that the store has.
async fn edit(store: &dyn Store, edit: KeyEdit) {
    let change = change(keys(store).await, edit);
    assert!(store.change_signing_keys(change).await.expect("the store"));
}

async fn a_signing_key_reads_back_as_it_was_written(database: &Database) {
    let store = database.store().await;
    assert_eq!(store.signing_keys().await.expect("the store"), []);
    store.add_first_signing_key(key("a")).await.expect("the store");
    assert_eq!(store.signing_keys().await.expect("the store"), [key("a")]);
    let undecided = SealedSigningKey { sign_time: None, ..key("b") };
    edit(store.as_ref(), KeyEdit::Add(undecided.clone())).await;
    assert_eq!(keys(store.as_ref()).await, [key("a"), undecided]);
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

async fn each_edit_changes_its_key_and_no_other(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    store.add_first_signing_key(key("a")).await.expect("the store");
    edit(store, KeyEdit::Add(SealedSigningKey { sign_time: None, ..key("b") })).await;
    let sign_time = NOW + 1.days();
    edit(store, KeyEdit::Schedule { kid: "b".to_owned(), sign_time }).await;
    let scheduled = SealedSigningKey { sign_time: Some(sign_time), ..key("b") };
    assert_eq!(keys(store).await, [key("a"), scheduled.clone()]);
    edit(store, KeyEdit::Reseal { kid: "a".to_owned(), sealed_private_key: vec![7] }).await;
    assert_eq!(keys(store).await, [SealedSigningKey { sealed_private_key: vec![7], ..key("a") }, scheduled.clone()]);
    edit(store, KeyEdit::Forget { kid: "a".to_owned() }).await;
    assert_eq!(keys(store).await, [scheduled]);
    assert_eq!(audit(store).await, [], "no event was named");
}

async fn a_change_that_was_decided_from_other_keys_changes_nothing(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    store.add_first_signing_key(key("a")).await.expect("the store");
    let a = || key("a");
    let others = [
        vec![],
        vec![a(), key("b")],
        vec![key("b")],
        vec![SealedSigningKey { algorithm: "RS256".to_owned(), ..a() }],
        vec![SealedSigningKey { sealed_private_key: vec![7], ..a() }],
        vec![SealedSigningKey { create_time: NOW + 1.microseconds(), ..a() }],
        vec![SealedSigningKey { sign_time: None, ..a() }],
        vec![SealedSigningKey { publish_ahead: Some(Duration::from_secs(1)), ..a() }],
    ];
    for expected in others {
        for edit in [KeyEdit::Add(key("c")), KeyEdit::Forget { kid: "a".to_owned() }] {
            let event = Some((Action::SigningKeyRevoked, "a".to_owned()));
            let change = KeyChange { event, ..change(expected.clone(), edit) };
            assert!(!store.change_signing_keys(change).await.expect("the store"), "{expected:?}");
        }
    }
    assert_eq!((keys(store).await, audit(store).await), (vec![a()], vec![]));
}

async fn of_eight_concurrent_next_keys_one_is_stored(database: &Database) {
    let stores = [database.store().await, database.store().await];
    stores[0].add_first_signing_key(key("first")).await.expect("the store");
    for round in 0..10 {
        let known = keys(stores[0].as_ref()).await;
        let steps = (0..8).map(|number| {
            let (store, known) = (Arc::clone(&stores[number % 2]), known.clone());
            let next = KeyEdit::Add(key(&format!("{round} {number}")));
            let event = Some((Action::SigningKeyScheduled, format!("{round} {number}")));
            let change = KeyChange { event, ..change(known, next) };
            tokio::spawn(async move { store.change_signing_keys(change).await.expect("the store") })
        });
        let won = join_all(steps).await.into_iter().filter(|won| *won.as_ref().expect("no panic")).count();
        assert_eq!(won, 1);
        assert_eq!(keys(stores[0].as_ref()).await.len(), known.len() + 1);
    }
    assert_eq!(audit(stores[0].as_ref()).await.len(), 10, "one row for each that won");
}

async fn a_revoked_key_is_in_the_log_of_revocations(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    store.add_first_signing_key(key("a")).await.expect("the store");
    let context = audit_context();
    let edits = vec![KeyEdit::Revoke { kid: "a".to_owned() }, KeyEdit::Add(key("b"))];
    let event = Some((Action::SigningKeyRevoked, "a".to_owned()));
    let change = KeyChange { expected: keys(store).await, edits, event, context };
    assert!(store.change_signing_keys(change).await.expect("the store"));

    assert_eq!(keys(store).await, [key("b")]);
    let log = store.revocations(0, &[]).await.expect("the store");
    let session = revocation_id("a");
    assert_eq!(log.iter().map(|entry| entry.what.clone()).collect::<Vec<_>>(), [Revoked::Session(session)]);
    assert!(log[0].retain_until >= context.retain_until);
    let events = audit(store).await;
    assert_eq!((events[0].action.as_str(), events[0].detail.as_deref()), ("signing_key_revoked", Some("a")));
}

/// A replica of the release before writes the columns that it knows.
async fn a_key_of_a_release_without_rotation_is_read_as_such(database: &Database) {
    let store = database.store().await;
    store.add_first_signing_key(key("a")).await.expect("the store");
    let statement = "INSERT INTO signing_keys (kid, algorithm, sealed_private_key, create_time) \
         SELECT 'b', algorithm, sealed_private_key, create_time FROM signing_keys";
    database.sql.execute(statement).await;
    let old = SealedSigningKey { sign_time: None, publish_ahead: None, ..key("b") };
    assert_eq!(keys(store.as_ref()).await, [key("a"), old]);
}

/// Its rotation comes one period after the upgrade: until then, replicas of the old release may be running.
async fn the_key_of_a_release_without_rotation_is_as_good_as_new_after_the_upgrade(database: &Database) {
    let store = database.store().await;
    store.add_first_signing_key(key("a")).await.expect("the store");
    drop(store);
    for column in ["sign_time", "publish_ahead_seconds"] {
        database.sql.execute(&format!("ALTER TABLE signing_keys DROP COLUMN {column}")).await;
    }
    database.sql.execute("DELETE FROM _sqlx_migrations WHERE version = 12").await;
    let before = Env::system().now();
    let store = store::connect(&database.database(), Migrate::Apply).await.expect("the schema is up to date");
    let [migrated] = keys(store.as_ref()).await.try_into().expect("one key");
    let sign_time = migrated.sign_time.expect("it is decided");
    assert!((sign_time - before).abs() < 1.minutes(), "{sign_time}");
    assert_eq!(migrated, SealedSigningKey { sign_time: Some(sign_time), publish_ahead: None, ..key("a") });
}

async fn a_reachable_store_answers_pings(database: &Database) {
    let store = database.store().await;
    for _ in 0..3 {
        store.ping().await.expect("an answer");
    }
}
