//! The schema: migrated, checked, and laid out so that a refresh stays cheap.

use futures_util::future::join_all;
use postern::{
    database_url::DatabaseUrl,
    store::{self, Migrate, OpenError},
};
use secrecy::SecretString;
use time::ext::NumericalDuration as _;

use crate::{
    fixtures::{Token, log_in, new_session, refresh, sign_up},
    support::{Database, Engine, on_each_engine, wait_until, with_database},
};

on_each_engine![
    migrating_an_up_to_date_schema_changes_nothing,
    an_empty_database_is_refused_unless_it_may_be_migrated,
    a_migration_of_a_later_release_is_accepted,
    times_are_stored_to_the_microsecond,
];

async fn open(database: &Database, migrate: Migrate) -> Result<(), OpenError> {
    store::connect(&database.database(), migrate).await.map(drop)
}

async fn migrating_an_up_to_date_schema_changes_nothing(database: &Database) {
    let user = sign_up(database.store().await.as_ref(), "ada").await;
    open(database, Migrate::Apply).await.expect("an up-to-date schema");
    open(database, Migrate::Check).await.expect("an up-to-date schema");
    let store = database.store().await;
    let found = store.credentials(&user.email).await.expect("the store").expect("an account");
    assert_eq!(found.user, user);
    let distinct = database.sql.number("SELECT count(DISTINCT version) FROM _sqlx_migrations").await;
    assert_eq!(database.sql.number("SELECT count(*) FROM _sqlx_migrations").await, distinct);
}

async fn an_empty_database_is_refused_unless_it_may_be_migrated(database: &Database) {
    database.clear().await;
    if let DatabaseUrl::Sqlite(file) = database.database() {
        database.database().create_directory().expect("a directory");
        std::fs::write(file, "").expect("an empty database");
    }
    let refusal = open(database, Migrate::Check).await.expect_err("the database is empty");
    assert!(matches!(refusal, OpenError::SchemaOutdated(1)), "{refusal:?}");
    assert!(refusal.to_string().contains("postern migrate"), "{refusal}");
    let tables = match database.engine {
        Engine::Sqlite => "SELECT count(*) FROM sqlite_master",
        Engine::Postgres => "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'",
    };
    assert_eq!(database.sql.number(tables).await, 0, "a check changes nothing");
    open(database, Migrate::Apply).await.expect("a schema");
    open(database, Migrate::Check).await.expect("an up-to-date schema");
}

async fn a_migration_of_a_later_release_is_accepted(database: &Database) {
    database.database().create_directory().expect("a directory");
    open(database, Migrate::Apply).await.expect("a schema");
    let bytes = match database.engine {
        Engine::Sqlite => "x'00'",
        Engine::Postgres => r"'\x00'",
    };
    database
        .sql
        .execute(&format!(
            "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) \
             VALUES (9999, 'of a release to come', true, {bytes}, 0)"
        ))
        .await;
    open(database, Migrate::Apply).await.expect("a later migration is accepted");
    open(database, Migrate::Check).await.expect("a later migration is accepted");
}

async fn times_are_stored_to_the_microsecond(database: &Database) {
    let store = database.store().await;
    let user = sign_up(store.as_ref(), "ada").await;
    let end = new_session(user.id).grant.session_end_time;
    // Two times that are a microsecond apart, and one in the year 2243.
    for offset in [0.microseconds(), 1.microseconds(), 77_777.days()] {
        let mut session = new_session(user.id);
        session.grant.session_end_time = end + offset;
        store.open_session(session).await.expect("the store");
    }
    let purge = async |now| store.purge_sessions(now, 10).await.expect("the store");
    assert_eq!(purge(end + 1.microseconds()).await, 1);
    assert_eq!(purge(end + 2.microseconds()).await, 1);
    assert_eq!(purge(end + 77_777.days()).await, 0);
    assert_eq!(purge(end + 77_777.days() + 1.microseconds()).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_postgres_replicas_can_migrate_concurrently() {
    with_database(Engine::Postgres, async |database| {
        let migrations = (0..4).map(|_| open(database, Migrate::Apply));
        for outcome in join_all(migrations).await {
            outcome.expect("a schema");
        }
    })
    .await;
}

/// Only PostgreSQL has heap-only updates. They need a `fillfactor`, and no index on a column that a refresh changes.
/// The test does not depend on when dead row versions are pruned, which other connections can delay.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_postgres_a_refresh_is_a_heap_only_update() {
    with_database(Engine::Postgres, async |database| {
        let store = database.store().await;
        let user = sign_up(store.as_ref(), "ada").await;
        // Fills several pages, then updates some rows of each: the page of a row must have room for its new version.
        let mut tokens: Vec<Token> = Vec::new();
        for _ in 0..200 {
            tokens.push(log_in(store.as_ref(), &user).await);
        }
        for token in tokens.iter().step_by(20) {
            refresh(store.as_ref(), token).await;
        }
        drop(store);
        let heap_only = heap_only_updates(database, 10).await;
        assert_eq!(heap_only, 10, "every update stays on its page");

        let store = database.store().await;
        let mut token = tokens[1].clone();
        for _ in 0..200 {
            token = refresh(store.as_ref(), &token).await;
        }
        drop(store);
        // If a full page cannot be pruned at that moment, the row moves to another page.
        let heap_only = heap_only_updates(database, 210).await;
        assert!(heap_only >= 190, "only {heap_only} of 210 updates are heap-only");
    })
    .await;
}

/// How many updates of sessions were heap-only, once `updates` are counted. A backend reports its counts at the latest
/// when it ends.
async fn heap_only_updates(database: &Database, updates: i64) -> i64 {
    let counted = |column| format!("SELECT {column} FROM pg_stat_user_tables WHERE relname = 'sessions'");
    wait_until("the updates are counted", async || {
        (database.sql.number(&counted("n_tup_upd")).await == updates).then_some(())
    })
    .await;
    database.sql.number(&counted("n_tup_hot_upd")).await
}

/// The error names the reason and does not contain the password.
#[tokio::test]
async fn an_invalid_url_is_refused_and_its_password_is_not_printed() {
    let location = DatabaseUrl::Postgres {
        url: SecretString::from("postgres://u:hunter2@[::1/postern"),
        max_connections: 1,
        notifications: false,
    };
    let refusal = store::connect(&location, Migrate::Check).await.expect_err("the URL is invalid");
    assert!(matches!(refusal, OpenError::Url(_)), "{refusal:?}");
    assert!(!format!("{refusal:?} {refusal} {location:?}").contains("hunter2"));
}
