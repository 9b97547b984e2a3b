//! What both test binaries stand on: the two engines, and a database of its own for each test.
//!
//! PostgreSQL is the server that TEST_DATABASE_URL names, by a superuser's URL. Without it the PostgreSQL half is left
//! out and says so; under CI=true that is an error. `app.rs` beside this file has the running service on top.

mod sql;

use std::{
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

pub use sql::Sql;

/// How long a test waits for what must come about by itself, until it gives up.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often it looks meanwhile.
const GLANCE: Duration = Duration::from_millis(5);

/// The backends that everything runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    Sqlite,
    Postgres,
}

/// Makes two tests of each `async fn name(database: &Database)`: `sqlite::name` and `postgres::name`. A function that
/// is not listed is dead code, and the build says so.
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

/// Runs a test on a database of its own. Afterwards no transaction may be open in it, and it is removed.
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

/// An empty database for one test.
pub struct Database {
    pub engine: Engine,
    url: String,
    /// A way in past the store: for what no RPC can do yet, and for looking at what is really there.
    pub sql: Sql,
    /// Of PostgreSQL: its name on the server.
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
                // template0 has no other connections, which would keep it from being copied.
                Sql::postgres(&server).execute(&format!("CREATE DATABASE {name} TEMPLATE template0")).await;
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
            let server = postgres_server().expect("it was there when the database was made");
            Sql::postgres(&server).execute(&format!("DROP DATABASE {} WITH (FORCE)", self.name)).await;
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

    /// A store of its own on this database, its schema up to date.
    pub async fn store(&self) -> Arc<dyn Store> {
        let location = self.database();
        location.create_directory().expect("a directory for the database");
        store::connect(&location, Migrate::Apply).await.expect("a store")
    }

    /// Fails if anybody keeps a transaction open in this database.
    pub async fn assert_at_rest(&self) {
        if self.engine == Engine::Sqlite && !sqlite_file(&self.directory).exists() {
            return;
        }
        wait_until("no transaction is open", async || self.sql.at_rest().await.then_some(())).await;
    }
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

/// The server of the PostgreSQL half, or `None`, said aloud, where it is left out.
fn postgres_server() -> Option<String> {
    static SAID: Once = Once::new();
    let url = environment("TEST_DATABASE_URL");
    if url.is_none() {
        assert_ne!(environment("CI").as_deref(), Some("true"), "CI=true, and TEST_DATABASE_URL is not set");
        SAID.call_once(|| {
            // Straight to standard error: what `eprintln!` writes in a test that passes is never seen.
            let line = "LEFT OUT: everything on PostgreSQL, because TEST_DATABASE_URL is not set; scripts/test sets it";
            writeln!(std::io::stderr(), "\n{line}\n").expect("standard error");
        });
    }
    url
}

#[expect(
    clippy::disallowed_methods,
    reason = "these say where and how the tests run; Postern's own settings are not read"
)]
fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Waits until the probe finds something, and returns that.
pub async fn wait_until<T>(what: &str, mut probe: impl AsyncFnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = probe().await {
            return found;
        }
        assert!(started.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain until {what}");
        tokio::time::sleep(GLANCE).await;
    }
}
