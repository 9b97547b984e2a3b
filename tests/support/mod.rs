//! Shared by both test binaries: the two engines, and a separate database for each test.
//!
//! TEST_DATABASE_URL names the PostgreSQL server, with a superuser. Without it the tests on PostgreSQL are left out with
//! a message; with CI=true that is an error. `app.rs` adds the running service.

mod sql;

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io::Write as _,
    panic::{AssertUnwindSafe, resume_unwind},
    path::PathBuf,
    sync::{Arc, Once},
    time::{Duration, Instant},
};

use futures_util::FutureExt as _;
use postern::{
    database_url::DatabaseUrl,
    domain::{env::Env, ports::Store},
    store::{self, Migrate},
};
use secrecy::SecretString;
use tempfile::TempDir;
use tokio::sync::OnceCell;

pub use sql::Sql;

/// How long a test waits for a condition.
const TIMEOUT: Duration = Duration::from_secs(20);
/// How often it checks the condition.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// The backends that every test runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    Sqlite,
    Postgres,
}

/// Makes two tests of each `async fn name(database: &Database)`: `sqlite::name` and `postgres::name`. A function that
/// is not listed is dead code, which the compiler reports.
macro_rules! on_each_engine {
    ($($test:ident),+ $(,)?) => {
        mod sqlite {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                $crate::support::with_database($crate::support::Engine::Sqlite, super::$test).await;
            })+
        }
        mod postgres {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                $crate::support::with_database($crate::support::Engine::Postgres, super::$test).await;
            })+
        }
    };
}
pub(crate) use on_each_engine;

/// Runs a test on its own database and removes the database afterwards. Fails if a transaction is still open in it.
pub async fn with_database(engine: Engine, test: impl AsyncFnOnce(&Database)) {
    let Some(database) = Database::create(engine).await else {
        return;
    };
    let outcome = AssertUnwindSafe(test(&database)).catch_unwind().await;
    let at_rest = AssertUnwindSafe(database.assert_at_rest()).catch_unwind().await;
    database.remove().await;
    if let Some(panic) = outcome.err().or(at_rest.err()) {
        resume_unwind(panic);
    }
}

/// A database for one test. On PostgreSQL it has the schema and no rows; a SQLite file is created by the store.
pub struct Database {
    pub engine: Engine,
    url: String,
    /// Direct access to the database, to prepare what no RPC can do and to check what was written.
    pub sql: Sql,
    /// The name of a PostgreSQL database.
    name: String,
    directory: TempDir,
}

impl Database {
    async fn create(engine: Engine) -> Option<Self> {
        let directory = TempDir::new().expect("a temporary directory");
        let (name, url) = match engine {
            Engine::Sqlite => (String::new(), format!("sqlite:{}", directory.path().join("data/postern.db").display())),
            Engine::Postgres => {
                let server = postgres_server()?;
                let name = format!("postern_test_{}", Env::system().uuid().expect("randomness").simple());
                let template = migrated_template(&server).await;
                Sql::postgres(&server).execute(&format!("CREATE DATABASE {name} TEMPLATE {template}")).await;
                let url = with_database_name(&server, &name);
                (name, url)
            }
        };
        let sql = match engine {
            Engine::Sqlite => Sql::sqlite(&sqlite_file(&directory)),
            Engine::Postgres => Sql::postgres(&url),
        };
        Some(Self { engine, url, sql, name, directory })
    }

    async fn remove(self) {
        if self.engine == Engine::Postgres {
            let server = postgres_server().expect("the server of the created database");
            Sql::postgres(&server).execute(&format!("DROP DATABASE {} WITH (FORCE)", self.name)).await;
        }
    }

    /// Removes the schema too, for a test of the migrations.
    pub async fn clear(&self) {
        if self.engine == Engine::Postgres {
            self.sql.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public").await;
        }
    }

    pub fn database(&self) -> DatabaseUrl {
        match self.engine {
            Engine::Sqlite => DatabaseUrl::Sqlite(sqlite_file(&self.directory)),
            Engine::Postgres => {
                let url = SecretString::from(self.url.as_str());
                DatabaseUrl::Postgres { url, max_connections: 16, notifications: true }
            }
        }
    }

    /// A new store on this database, with the current schema.
    pub async fn store(&self) -> Arc<dyn Store> {
        let location = self.database();
        location.create_directory().expect("a directory for the database");
        store::connect(&location, Migrate::Apply).await.expect("a store")
    }

    /// Fails if a transaction stays open in this database.
    pub async fn assert_at_rest(&self) {
        if self.engine == Engine::Sqlite && !sqlite_file(&self.directory).exists() {
            return;
        }
        wait_until("no transaction is open", async || self.sql.at_rest().await.then_some(())).await;
    }
}

/// The name of a database with the schema. Each test copies it, because copying is faster than migrating. It is created
/// once for each state of the migrations, and later runs on the same server use it again. No connection to it stays
/// open, because PostgreSQL does not copy a database that is in use.
async fn migrated_template(server: &str) -> &'static str {
    static TEMPLATE: OnceCell<String> = OnceCell::const_new();
    let template = TEMPLATE.get_or_init(async || {
        let name = format!("postern_template_{:016x}", hash_of_migrations());
        let sql = Sql::postgres(server);
        if sql.number(&format!("SELECT count(*) FROM pg_database WHERE datname = '{name}'")).await == 1 {
            return name;
        }
        // It gets its name when it is complete, so that an interrupted run leaves no incomplete template.
        let draft = format!("postern_test_{}", Env::system().uuid().expect("randomness").simple());
        sql.execute(&format!("CREATE DATABASE {draft} TEMPLATE template0")).await;
        let url = SecretString::from(with_database_name(server, &draft));
        let database = DatabaseUrl::Postgres { url, max_connections: 1, notifications: false };
        drop(store::connect(&database, Migrate::Apply).await.expect("a schema"));
        let connections = format!("SELECT count(*) FROM pg_stat_activity WHERE datname = '{draft}'");
        wait_until("nobody is connected", async || (sql.number(&connections).await == 0).then_some(())).await;
        // Another process may have created the template in the meantime. Then the draft is not needed.
        let rename = format!(
            "DO $$ BEGIN ALTER DATABASE {draft} RENAME TO {name}; \
             EXCEPTION WHEN duplicate_database OR unique_violation THEN NULL; END $$"
        );
        sql.execute(&rename).await;
        sql.execute(&format!("DROP DATABASE IF EXISTS {draft}")).await;
        name
    });
    template.await
}

/// A hash of all migrations for PostgreSQL, to detect a template of another schema.
fn hash_of_migrations() -> u64 {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/migrations/postgres");
    let files = std::fs::read_dir(directory).expect("the migrations").map(|entry| entry.expect("an entry").path());
    let mut files: Vec<_> = files.map(|path| std::fs::read(path).expect("a migration")).collect();
    files.sort();
    let mut hasher = DefaultHasher::new();
    files.hash(&mut hasher);
    hasher.finish()
}

fn sqlite_file(directory: &TempDir) -> PathBuf {
    directory.path().join("data/postern.db")
}

/// The URL with another database in its path.
fn with_database_name(url: &str, name: &str) -> String {
    let (base, query) = url.split_once('?').map_or((url, String::new()), |(base, query)| (base, format!("?{query}")));
    let (scheme, rest) = base.split_once("://").expect("TEST_DATABASE_URL is a URL");
    let authority = rest.split('/').next().unwrap_or_default();
    format!("{scheme}://{authority}/{name}{query}")
}

/// The URL of the PostgreSQL server. `None`, with a message, if the tests on PostgreSQL are left out.
fn postgres_server() -> Option<String> {
    static MESSAGE: Once = Once::new();
    let url = environment("TEST_DATABASE_URL");
    if url.is_none() {
        assert_ne!(environment("CI").as_deref(), Some("true"), "CI=true, and TEST_DATABASE_URL is not set");
        MESSAGE.call_once(|| {
            // Written directly, because the output of `eprintln!` in a passing test is hidden.
            let line = "LEFT OUT: everything on PostgreSQL, because TEST_DATABASE_URL is not set; scripts/test sets it";
            writeln!(std::io::stderr(), "\n{line}\n").expect("standard error");
        });
    }
    url
}

#[expect(clippy::disallowed_methods, reason = "these variables are settings of the tests and not of Postern")]
fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Waits until the probe returns a value, and returns it.
pub async fn wait_until<T>(what: &str, mut probe: impl AsyncFnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = probe().await {
            return found;
        }
        assert!(started.elapsed() < TIMEOUT, "waited {TIMEOUT:?}, and it is still not true that {what}");
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}
