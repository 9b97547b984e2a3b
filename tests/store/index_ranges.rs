//! The cost of a page: one range of an index, at every depth of the list. The tests examine the statements that the
//! stores send, which sqlx reports to `tracing`.

use std::{
    collections::BTreeSet,
    fmt::Debug,
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use postern::domain::{
    audit::Action,
    ids::{AuditEventId, UserId},
    ports::{AuditPage, Store, UserOrder, UserPage},
};
use sqlx::{AssertSqlSafe, PgPool, Row as _, SqlitePool};
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{Layer, filter::filter_fn, layer::Context, layer::SubscriberExt as _};
use uuid::Uuid;

use crate::{
    fixtures::{NOW, all_sessions},
    support::{Database, Engine, Sql, with_database},
};

const ROWS: u128 = 40_000;
const LIMIT: u32 = 50;

/// Every statement that any test has sent since the first of these tests began, with its engine.
static STATEMENTS: LazyLock<Statements> = LazyLock::new(|| {
    let statements = Statements::default();
    let layer = statements.clone().with_filter(filter_fn(|metadata| metadata.target() == "sqlx::query"));
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(layer))
        .expect("no other test sets a subscriber");
    statements
});

#[derive(Clone, Default)]
struct Statements(Arc<Mutex<BTreeSet<(bool, String)>>>);

impl Statements {
    /// The statements that read lists.
    fn lists(&self, engine: Engine) -> Vec<String> {
        let statements = self.0.lock().expect("no thread panicked");
        let by_engine = statements.iter().filter(|(sqlite, _)| *sqlite == (engine == Engine::Sqlite));
        let is_list = |statement: &str| {
            let paged = statement.starts_with("SELECT") && statement.contains("LIMIT $1");
            (paged && (statement.contains("FROM users u") || statement.contains("FROM audit_events")))
                || (statement.contains("FROM sessions WHERE user_id") && statement.contains("ORDER BY id DESC"))
        };
        by_engine.map(|(_, statement)| statement.clone()).filter(|statement| is_list(statement)).collect()
    }
}

impl<S: Subscriber> Layer<S> for Statements {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        struct Statement(String);
        impl Visit for Statement {
            fn record_str(&mut self, field: &Field, value: &str) {
                if field.name() == "db.statement" {
                    value.trim().clone_into(&mut self.0);
                }
            }
            fn record_debug(&mut self, _: &Field, _: &dyn Debug) {}
        }
        let mut statement = Statement(String::new());
        event.record(&mut statement);
        // Statements of SQLite run on threads of their own.
        let thread = std::thread::current();
        let on_sqlite = thread.name().is_some_and(|name| name.contains("sqlite"));
        self.0.lock().expect("no thread panicked").insert((on_sqlite, statement.0));
    }
}

fn id(number: u128) -> Uuid {
    Uuid::from_u128(number)
}

/// Fills the tables that lists read: one range of addresses, one of usernames, and some users with many rows each.
async fn fill(database: &Database) {
    let (numbers, hex, values) = match database.engine {
        Engine::Sqlite => (
            format!("WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {ROWS}) "),
            "printf('%05d', i)",
            ["unhex(printf('%032x', i))", "unhex(printf('%032x', i % 1000 + 1))", "x''", "0"],
        ),
        Engine::Postgres => (
            format!("WITH n (i) AS (SELECT * FROM generate_series(1, {ROWS}) AS i) "),
            "lpad(i::text, 5, '0')",
            ["lpad(to_hex(i), 32, '0')::uuid", "lpad(to_hex(i % 1000 + 1), 32, '0')::uuid", "''", "now()"],
        ),
    };
    let [row_id, few_users, no_bytes, time] = values;
    let later = match database.engine {
        Engine::Sqlite => "4000000000000000".to_owned(),
        Engine::Postgres => "timestamptz '2040-01-01'".to_owned(),
    };
    for (table, select) in [
        (
            "users (id, username, email, password_hash, create_time, update_time)",
            format!("SELECT {row_id}, 'Name-' || {hex}, 'mail-' || {hex} || '@example.com', '', {time}, {time} FROM n"),
        ),
        ("user_roles (user_id, role)", format!("SELECT {row_id}, 'user' FROM n")),
        (
            "sessions (id, user_id, create_time, end_time, generation, refresh_hash, refresh_issue_time, \
             refresh_expire_time, last_refresh_time)",
            format!("SELECT {row_id}, {few_users}, {time}, {time}, 0, {no_bytes}, {time}, {later}, {time} FROM n"),
        ),
        (
            "audit_events (id, create_time, action, user_id)",
            format!("SELECT {row_id}, {time}, CASE i % 3 WHEN 0 THEN 'login' ELSE 'logout' END, {few_users} FROM n"),
        ),
    ] {
        database.sql.execute(&format!("INSERT INTO {table} {numbers} {select}")).await;
    }
    if database.engine == Engine::Postgres {
        database.sql.execute("VACUUM ANALYZE").await;
    }
}

/// Reads every kind of page once.
async fn read_every_list(store: &dyn Store) {
    let (prefix, cursor) = ("mail-".to_owned(), Some("mail-1".to_owned()));
    for order in [
        UserOrder::ById { after: None },
        UserOrder::ById { after: Some(UserId(id(7))) },
        UserOrder::ByEmail { prefix: prefix.clone(), after: None },
        UserOrder::ByEmail { prefix: prefix.clone(), after: cursor.clone() },
        UserOrder::ByUsername { prefix: prefix.clone(), after: None },
        UserOrder::ByUsername { prefix, after: cursor },
    ] {
        store.list_users(UserPage { order, limit: LIMIT }).await.expect("the store");
    }
    for (user, action) in [
        (None, None),
        (Some(UserId(id(7))), None),
        (None, Some(Action::Login)),
        (Some(UserId(id(7))), Some(Action::Login)),
    ] {
        for before in [None, Some(AuditEventId(id(7)))] {
            store.list_audit_events(AuditPage { user, action, before, limit: LIMIT }).await.expect("the store");
        }
    }
    store.list_sessions(all_sessions(UserId(id(7)), NOW)).await.expect("the store");
}

/// The value of a parameter of a list.
#[derive(Clone)]
enum Value {
    Limit,
    Id(u128),
    Text(String),
    Now,
}

/// The values of a list's parameters, in their order, for a page at this depth.
fn parameters(statement: &str, depth: u128) -> Vec<Value> {
    let text = |text: &str| Value::Text(text.to_owned());
    if statement.contains("FROM sessions") {
        return vec![Value::Id(7), Value::Now, Value::Id(ROWS + 1 - depth), Value::Limit];
    }
    if statement.contains("FROM audit_events") {
        let mut values = vec![Value::Limit, Value::Id(ROWS + 1 - depth)];
        if statement.contains("user_id = $") {
            values.push(Value::Id(7));
        }
        if statement.contains("action = $") {
            values.push(text("login"));
        }
        return values;
    }
    let prefix = if statement.contains("lower(u.username)") { "name-" } else { "mail-" };
    let values = if statement.contains("$3") {
        let end = format!("{prefix}\u{10ffff}");
        vec![Value::Limit, text(&format!("{prefix}{depth:05}")), text(prefix), text(&end)]
    } else if statement.contains("$2") && statement.contains("u.id >") {
        vec![Value::Limit, Value::Id(depth)]
    } else if statement.contains("$2") {
        // From the beginning of the range, or from a cursor in it, to its end.
        vec![Value::Limit, text(&format!("{prefix}{depth:05}")), text(&format!("{prefix}\u{10ffff}"))]
    } else {
        vec![Value::Limit]
    };
    let count = (1..9).filter(|number| statement.contains(&format!("${number}"))).count();
    assert_eq!(values.len(), count, "{statement}");
    values
}

/// How many instructions SQLite runs for a statement. The count shows every sort and every scan.
async fn instructions(pool: &SqlitePool, statement: &str, depth: u128) -> u64 {
    let mut query = sqlx::query::<sqlx::Sqlite>(AssertSqlSafe(statement.to_owned()));
    for value in parameters(statement, depth) {
        query = match value {
            Value::Limit => query.bind(i64::from(LIMIT)),
            Value::Id(number) => query.bind(id(number)),
            Value::Text(text) => query.bind(text),
            Value::Now => query.bind(0_i64),
        };
    }
    let mut connection = pool.acquire().await.expect("a connection");
    let count = Arc::new(AtomicU64::new(0));
    let counting = Arc::clone(&count);
    connection.lock_handle().await.expect("a handle").set_progress_handler(1, move || {
        counting.fetch_add(1, Ordering::Relaxed);
        true
    });
    let found = query.fetch_all(&mut *connection).await.expect("valid SQL").len();
    connection.lock_handle().await.expect("a handle").remove_progress_handler();
    assert!(found >= 9, "too few rows for this test: {found} for {statement}");
    count.load(Ordering::Relaxed)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_sqlite_a_page_costs_the_same_at_every_depth() {
    LazyLock::force(&STATEMENTS);
    with_database(Engine::Sqlite, async |database| {
        let store = database.store().await;
        fill(database).await;
        read_every_list(store.as_ref()).await;
        let statements = STATEMENTS.lists(Engine::Sqlite);
        assert!(statements.len() >= 9, "{statements:#?}");
        let Sql::Sqlite(pool) = &database.sql else { panic!("not SQLite") };
        for statement in statements {
            let costs = [instructions(pool, &statement, 1).await, instructions(pool, &statement, ROWS / 4).await];
            assert!(costs.iter().all(|cost| *cost < u64::from(LIMIT) * 200), "{costs:?} for {statement}");
            assert!(costs[1] < costs[0] * 2, "{costs:?} for {statement}");
            let plan = format!("EXPLAIN QUERY PLAN {statement}");
            let plan = sqlx::query(AssertSqlSafe(plan)).fetch_all(pool).await.expect("a plan");
            for step in plan {
                let step: String = step.get("detail");
                assert!(!step.contains("TEMP B-TREE FOR ORDER BY"), "{step} for {statement}");
            }
        }
    })
    .await;
}

/// PostgreSQL's plan for a statement, without the subplans that run for each row.
async fn plan(pool: &PgPool, mode: &str, statement: &str, depth: u128) -> String {
    let values = parameters(statement, depth).into_iter().map(|value| match value {
        Value::Limit => LIMIT.to_string(),
        Value::Id(number) => format!("'{}'", id(number)),
        Value::Text(text) => format!("'{text}'"),
        Value::Now => "'2030-01-01'".to_owned(),
    });
    let values = values.collect::<Vec<_>>().join(", ");
    let mut connection = pool.acquire().await.expect("a connection");
    let prepare = format!("SET plan_cache_mode = {mode}; PREPARE list AS {statement}");
    sqlx::raw_sql(AssertSqlSafe(prepare)).execute(&mut *connection).await.expect("valid SQL");
    let explain = format!("EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, SUMMARY OFF) EXECUTE list ({values})");
    let lines = sqlx::raw_sql(AssertSqlSafe(explain)).fetch_all(&mut *connection).await.expect("a plan");
    let lines: Vec<String> = lines.iter().map(|line| line.get(0)).collect();
    sqlx::raw_sql("DEALLOCATE list; RESET plan_cache_mode").execute(&mut *connection).await.expect("valid SQL");
    let subplans = lines.iter().position(|line| line.contains("SubPlan")).unwrap_or(lines.len());
    lines[..subplans].join("\n")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_postgres_a_page_is_an_index_range_at_every_depth() {
    LazyLock::force(&STATEMENTS);
    with_database(Engine::Postgres, async |database| {
        let store = database.store().await;
        fill(database).await;
        read_every_list(store.as_ref()).await;
        let statements = STATEMENTS.lists(Engine::Postgres);
        assert!(statements.len() >= 9, "{statements:#?}");
        let Sql::Postgres(pool) = &database.sql else { panic!("not PostgreSQL") };
        for statement in statements {
            for mode in ["force_custom_plan", "force_generic_plan"] {
                for depth in [1, ROWS / 4] {
                    let plan = plan(pool, mode, &statement, depth).await;
                    let message = format!("{mode}, depth {depth}:\n{plan}\nfor {statement}");
                    assert!(plan.contains("Index"), "{message}");
                    assert!(!plan.contains("Seq Scan"), "{message}");
                    // A planner may sort the few rows of one user.
                    let one_user = statement.contains("user_id = $");
                    assert!(one_user || !plan.contains("Sort"), "{message}");
                    let removed = plan.lines().filter_map(|line| line.trim().strip_prefix("Rows Removed by Filter: "));
                    let removed: u32 = removed.map(|count| count.parse::<u32>().expect("a number")).sum();
                    // Every third event of a user is a login.
                    assert!(removed <= LIMIT * 4, "{message}");
                }
            }
        }
    })
    .await;
}
