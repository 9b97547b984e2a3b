//! The load and the limits of `bench/run`. Each command prints one line of JSON.
//!
//!     load argon2         Argon2id alone, as fast as the machine computes it
//!     load limit-server   a server of tonic alone, or of tonic and one SELECT
//!     load calls          clients that call one RPC without pause, or at a steady pace
//!     load revocations    a set of revoked sessions, read from a log of a million lines
//!     load seen           one write of 10,000 seen generations, with 100,000 sessions
//!     load storm          clients that log in without pause, and cheap calls at a steady pace beside them

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a benchmark may panic")]

#[path = "load/limit.rs"]
mod limit;

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use argon2::{Algorithm, Argon2, Block, Params, Version};
use clap::{Parser, ValueEnum};
use futures_util::future::join_all;
use postern::{
    database_url::DatabaseUrl,
    domain::{
        env::Env,
        ids::{SessionId, UserId},
        ports::Store,
        revocation::Revocations,
        role::{self, Caller},
        seen::SeenGeneration,
    },
    proto::{GetMeRequest, LoginRequest, RefreshRequest, SignUpRequest, auth_service_client::AuthServiceClient},
    store::{self, Migrate},
};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, PgPool, SqlitePool, postgres::PgPoolOptions};
use tokio_util::sync::CancellationToken;
use tonic::{
    Code, Request, Status,
    transport::{Channel, Endpoint},
};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use uuid::Uuid;

use self::limit::Limit;

/// The default parameters of Postern.
const MEMORY_KIB: u32 = 19_456;
const ITERATIONS: u32 = 2;
const PASSWORD: &str = "correct horse battery staple";
/// The pause between two cheap calls of one kind, long enough that these calls are no load.
const PACE: Duration = Duration::from_millis(4);
/// How many clients make the cheap calls of one kind in turn, so that a slow call does not delay the next one.
const CHEAP_CALLERS: u32 = 16;

#[derive(Parser)]
enum Command {
    Argon2 {
        #[arg(long)]
        threads: usize,
        #[arg(long)]
        seconds: u64,
    },
    LimitServer {
        #[arg(long)]
        address: SocketAddr,
        #[arg(long)]
        database_url: Option<String>,
        /// A query with the parameters session and user, as Postern sends it.
        #[arg(long)]
        statement: Option<String>,
        #[arg(long)]
        session: Option<Uuid>,
        #[arg(long)]
        user: Option<Uuid>,
    },
    Calls {
        #[arg(long)]
        address: String,
        #[arg(long)]
        rpc: Rpc,
        #[arg(long)]
        clients: usize,
        #[arg(long)]
        seconds: u64,
        /// The time from one call of a client to its next, in microseconds; 0 for no pause.
        #[arg(long, default_value_t = 0)]
        pace: u64,
    },
    Revocations {
        /// An empty database with the schema of Postern.
        #[arg(long)]
        database_url: String,
        #[arg(long, default_value_t = 1_000_000)]
        lines: i64,
    },
    Seen {
        /// An empty PostgreSQL database with the schema of Postern.
        #[arg(long)]
        database_url: String,
        /// Where to make an embedded database.
        #[arg(long)]
        file: PathBuf,
    },
    Storm {
        #[arg(long)]
        address: String,
        #[arg(long)]
        clients: usize,
        #[arg(long)]
        seconds: u64,
        /// What the clients send: logins, or sign-ups with passwords that are expensive to check.
        #[arg(long, default_value = "login")]
        of: Storm,
        /// The cheap calls at a steady pace beside it.
        #[arg(long, value_delimiter = ',')]
        beside: Vec<Rpc>,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, ValueEnum)]
enum Rpc {
    Login,
    GetMe,
    Refresh,
    Health,
    /// GetMe of the limit server, which requires no token.
    Limit,
}

impl Rpc {
    fn name(self) -> String {
        self.to_possible_value().unwrap().get_name().replace('-', "_")
    }
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Storm {
    Login,
    HostileSignUp,
}

type Client = AuthServiceClient<Channel>;

#[tokio::main]
async fn main() {
    // Cargo adds `--bench`.
    let result = match Command::parse_from(std::env::args().filter(|argument| argument != "--bench")) {
        Command::Argon2 { threads, seconds } => argon2(threads, seconds),
        Command::LimitServer { address, database_url, statement, session, user } => {
            let pool = match database_url {
                Some(url) => Some(PgPoolOptions::new().max_connections(32).connect(&url).await.unwrap()),
                None => None,
            };
            let limit = Limit { pool, statement: statement.unwrap_or_default(), session, user };
            limit.serve(address).await;
            Value::Null
        }
        Command::Calls { address, rpc, clients, seconds, pace } => {
            calls(&address, rpc, clients, Duration::from_secs(seconds), Duration::from_micros(pace)).await
        }
        Command::Revocations { database_url, lines } => revocations(database_url, lines).await,
        Command::Seen { database_url, file } => seen(database_url, file).await,
        Command::Storm { address, clients, seconds, of, beside } => {
            storm(&address, clients, Duration::from_secs(seconds), of, &beside).await
        }
    };
    println!("{result}");
}

fn argon2(threads: usize, seconds: u64) -> Value {
    let started = Instant::now();
    let counts: Vec<_> = (0..threads)
        .map(|_| {
            std::thread::spawn(move || {
                let params = Params::new(MEMORY_KIB, ITERATIONS, 1, Some(32)).unwrap();
                let mut arena = vec![Block::default(); params.block_count()];
                let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
                let (mut count, mut output) = (0_u64, [0; 32]);
                while started.elapsed().as_secs() < seconds {
                    let salt = count.to_le_bytes().repeat(2);
                    argon2.hash_password_into_with_memory(PASSWORD.as_bytes(), &salt, &mut output, &mut arena).unwrap();
                    count += 1;
                }
                count
            })
        })
        .collect();
    let total: u64 = counts.into_iter().map(|thread| thread.join().unwrap()).sum();
    json!({ "per_second": ratio(total, started.elapsed()) })
}

/// The size and the speed of the set of revocations.
async fn revocations(database_url: String, lines: i64) -> Value {
    let pool = PgPoolOptions::new().max_connections(1).connect(&database_url).await.unwrap();
    let write = async |lines: i64| {
        let statement = "INSERT INTO revocations (session_id, revoke_time, forget_time) \
                         SELECT gen_random_uuid(), now(), now() + interval '1 hour' FROM generate_series(1, $1)";
        sqlx::query(statement).bind(lines).execute(&pool).await.unwrap();
    };
    write(lines).await;
    let url = DatabaseUrl::Postgres { url: database_url.into(), max_connections: 2, notifications: false };
    let store = store::connect(&url, Migrate::Check).await.unwrap();
    let (set, now) = (Revocations::new(Duration::from_mins(16)), Env::system().now());
    let before = resident_bytes();
    set.poll(store.as_ref(), now).await.unwrap();
    let grown = resident_bytes() - before;

    let mut polls = Vec::new();
    for _ in 0..21 {
        write(10).await;
        let started = Instant::now();
        set.poll(store.as_ref(), now).await.unwrap();
        polls.push(started.elapsed());
    }
    polls.sort_unstable();

    // A multiplication spreads the ids over the set.
    let id = |number: u128| Uuid::from_u128(number.wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835));
    let caller = |number| {
        Caller::Person(role::Person {
            user_id: UserId(id(number)),
            session_id: SessionId(id(number + 1)),
            roles: Vec::new(),
        })
    };
    let callers: Vec<_> = (0..200_000).map(caller).collect();
    let (count, started) = (callers.len(), Instant::now());
    let accepted = callers.into_iter().filter(|caller| set.check(caller.clone()).is_ok()).count();
    assert_eq!(accepted, count, "none of them was revoked");
    let check = started.elapsed() / u32::try_from(count).unwrap();
    json!({
        "lines": lines, "bytes_per_line": grown / lines, "check_ns": u64::try_from(check.as_nanos()).unwrap(),
        "poll_us": u64::try_from(polls[10].as_micros()).unwrap(),
    })
}

/// 100,000 sessions of one user. `{id}`, `{other}`, `{bytes}` and `{time}` are expressions of the dialect, `{series}` a table.
const SESSIONS: &str = "WITH person AS (SELECT {other} AS id) \
     INSERT INTO users (id, username, email, password_hash, create_time, update_time) \
     SELECT id, 'ada', 'ada@example.com', '', {time}, {time} FROM person; \
     INSERT INTO sessions (id, user_id, create_time, end_time, generation, refresh_hash, refresh_issue_time, \
     refresh_expire_time, last_refresh_time) \
     SELECT {id}, (SELECT id FROM users), {time}, {time}, 0, {bytes}, {time}, {time}, {time} FROM {series}";

/// How long one write of seen generations takes on each engine.
async fn seen(database_url: String, file: PathBuf) -> Value {
    let dialect = |id: &str, bytes: &str, time: &str, series: &str| {
        let sql = SESSIONS.replace("{id}", id).replace("{other}", id).replace("{bytes}", bytes);
        AssertSqlSafe(sql.replace("{time}", time).replace("{series}", series))
    };
    let postgres = PgPool::connect(&database_url).await.unwrap();
    let sql = dialect("gen_random_uuid()", "''::bytea", "now()", "generate_series(1, 100000)");
    sqlx::raw_sql(sql).execute(&postgres).await.unwrap();
    let ids =
        sqlx::query_scalar("SELECT id FROM sessions ORDER BY random() LIMIT 10000").fetch_all(&postgres).await.unwrap();
    let url = DatabaseUrl::Postgres { url: database_url.into(), max_connections: 2, notifications: false };
    let on_postgres = write_of_seen(store::connect(&url, Migrate::Check).await.unwrap().as_ref(), ids).await;

    let store = store::connect(&DatabaseUrl::Sqlite(file.clone()), Migrate::Apply).await.unwrap();
    let sqlite = SqlitePool::connect(&format!("sqlite:{}", Path::new(&file).display())).await.unwrap();
    let series = "(WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000) SELECT i FROM n)";
    sqlx::raw_sql(dialect("randomblob(16)", "x''", "0", series)).execute(&sqlite).await.unwrap();
    let ids =
        sqlx::query_scalar("SELECT id FROM sessions ORDER BY random() LIMIT 10000").fetch_all(&sqlite).await.unwrap();
    json!({ "postgres_ms": on_postgres, "sqlite_ms": write_of_seen(store.as_ref(), ids).await })
}

/// The median of the times that a write takes, in milliseconds.
async fn write_of_seen(store: &dyn Store, sessions: Vec<Uuid>) -> f64 {
    let mut times = Vec::new();
    for generation in 1..=11 {
        let seen = |session: &Uuid| SeenGeneration { session: SessionId(*session), generation };
        let batch: Vec<_> = sessions.iter().map(seen).collect();
        let started = Instant::now();
        assert_eq!(store.write_seen(&batch).await.unwrap(), []);
        times.push(started.elapsed());
    }
    times.sort_unstable();
    times[5].as_secs_f64() * 1e3
}

/// The resident memory of this process.
fn resident_bytes() -> i64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split_whitespace().nth(1).unwrap().parse::<i64>().unwrap() * 4_096
}

/// A user with an account, a session and a connection.
#[derive(Clone)]
struct Person {
    client: Client,
    health: HealthClient<Channel>,
    login: LoginRequest,
    access_token: String,
    refresh_token: String,
}

impl Person {
    async fn new(address: &str) -> Self {
        let mut person = Self::without_account(address).await;
        let client = &mut person.client;
        let name = new_name();
        let email = format!("{name}@example.com");
        let sign_up = SignUpRequest { username: name, email: email.clone(), password: PASSWORD.to_owned() };
        while let Err(refused) = client.sign_up(sign_up.clone()).await {
            wait_for_room(&refused).await;
        }
        let login = LoginRequest { email, password: PASSWORD.to_owned() };
        let tokens = loop {
            match client.login(login.clone()).await {
                Ok(answer) => break answer.into_inner().tokens.unwrap(),
                Err(refused) => wait_for_room(&refused).await,
            }
        };
        Self { login, access_token: tokens.access_token, refresh_token: tokens.refresh_token, ..person }
    }

    async fn without_account(address: &str) -> Self {
        let channel = connect(address).await;
        Self {
            client: AuthServiceClient::new(channel.clone()),
            health: HealthClient::new(channel),
            login: LoginRequest::default(),
            access_token: String::new(),
            refresh_token: String::new(),
        }
    }

    async fn call(&mut self, rpc: Rpc) -> Result<(), Status> {
        match rpc {
            Rpc::Login => self.client.login(self.login.clone()).await.map(drop),
            Rpc::GetMe => {
                let mut request = Request::new(GetMeRequest {});
                let bearer = format!("Bearer {}", self.access_token);
                request.metadata_mut().insert("authorization", bearer.parse().unwrap());
                self.client.get_me(request).await.map(drop)
            }
            Rpc::Refresh => {
                let request = RefreshRequest { refresh_token: self.refresh_token.clone() };
                let answer = self.client.refresh(request).await?.into_inner();
                self.refresh_token = answer.tokens.unwrap().refresh_token;
                Ok(())
            }
            Rpc::Health => self.health.check(HealthCheckRequest::default()).await.map(drop),
            Rpc::Limit => self.client.get_me(GetMeRequest {}).await.map(drop),
        }
    }
}

/// Waits before a refused call is repeated, because users are also created in the middle of a storm.
async fn wait_for_room(refused: &Status) {
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    tokio::time::sleep(Duration::from_millis(50)).await;
}

/// A username that is not taken.
fn new_name() -> String {
    format!("load-{}", Env::system().uuid().unwrap().simple())
}

async fn connect(address: &str) -> Channel {
    Endpoint::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap()
}

/// Signs up users, a few at a time, because each needs two hashes.
async fn people(address: &str, count: usize) -> Vec<Person> {
    let mut people = Vec::new();
    while people.len() < count {
        let some = (count - people.len()).min(8);
        people.extend(join_all((0..some).map(|_| Person::new(address))).await);
    }
    people
}

/// The calls of one client.
#[derive(Default)]
struct Outcome {
    times: Vec<Duration>,
    refused: u64,
    failed: u64,
}

impl Outcome {
    fn add(&mut self, answer: Result<(), Status>, time: Duration) {
        match answer {
            Ok(()) => self.times.push(time),
            Err(status) if status.code() == Code::ResourceExhausted => self.refused += 1,
            Err(status) => {
                if self.failed == 0 {
                    eprintln!("{status}");
                }
                self.failed += 1;
            }
        }
    }

    fn join(outcomes: Vec<Self>) -> Self {
        let mut all = Self::default();
        for outcome in outcomes {
            all.times.extend(outcome.times);
            all.refused += outcome.refused;
            all.failed += outcome.failed;
        }
        all.times.sort_unstable();
        all
    }

    fn report(&self, within: Duration) -> Value {
        let at = |share: usize| {
            let index = self.times.len().saturating_sub(1) * share / 1000;
            self.times.get(index).map(|time| time.as_secs_f64() * 1_000.0)
        };
        let answered = u64::try_from(self.times.len()).unwrap();
        json!({
            "ok": answered, "refused": self.refused, "failed": self.failed, "per_second": ratio(answered, within),
            "refused_per_second": ratio(self.refused, within),
            "p50_ms": at(500), "p99_ms": at(990), "p999_ms": at(999),
        })
    }
}

#[expect(clippy::cast_precision_loss, reason = "a count of calls")]
fn ratio(count: u64, within: Duration) -> f64 {
    count as f64 / within.as_secs_f64()
}

async fn calls(address: &str, rpc: Rpc, clients: usize, within: Duration, pace: Duration) -> Value {
    let people = match rpc {
        Rpc::Limit | Rpc::Health => join_all((0..clients).map(|_| Person::without_account(address))).await,
        Rpc::Login | Rpc::GetMe | Rpc::Refresh => people(address, clients).await,
    };
    eprintln!("ready");
    let started = Instant::now();
    let running = people.into_iter().map(|person| tokio::spawn(call_for(person, rpc, started, within, pace)));
    let outcomes = join_all(running).await.into_iter().map(Result::unwrap).collect();
    Outcome::join(outcomes).report(started.elapsed())
}

/// Makes calls for a while from `started` on, each at the time when it is due. The latency of a call is measured from
/// that time, so that a server that stalls adds to the latency of every call that it delays.
async fn call_for(mut person: Person, rpc: Rpc, started: Instant, within: Duration, pace: Duration) -> Outcome {
    let (mut due, mut outcome) = (started, Outcome::default());
    while started.elapsed() < within {
        if pace.is_zero() {
            due = Instant::now();
        } else {
            due += pace;
            tokio::time::sleep_until(due.into()).await;
        }
        let answer = person.call(rpc).await;
        outcome.add(answer, due.elapsed());
    }
    outcome
}

async fn storm(address: &str, clients: usize, within: Duration, of: Storm, beside: &[Rpc]) -> Value {
    let cheap = if beside.is_empty() { Vec::new() } else { people(address, CHEAP_CALLERS as usize).await };
    let crowd = if of == Storm::Login { people(address, clients.min(64)).await } else { Vec::new() };
    let connections = join_all((0..clients).map(|_| connect(address))).await;
    eprintln!("ready");
    let (started, stop) = (Instant::now(), CancellationToken::new());
    let crowd = Arc::new(crowd);
    let storming: Vec<_> = connections
        .into_iter()
        .enumerate()
        .map(|(number, channel)| {
            let mut client = Client::new(channel);
            let (crowd, stop) = (Arc::clone(&crowd), stop.clone());
            tokio::spawn(async move {
                let mut outcome = Outcome::default();
                while !stop.is_cancelled() {
                    let called = Instant::now();
                    let answer = match of {
                        Storm::Login => client.login(crowd[number % crowd.len()].login.clone()).await.map(drop),
                        Storm::HostileSignUp => client.sign_up(hostile()).await.map(drop),
                    };
                    outcome.add(answer, called.elapsed());
                }
                outcome
            })
        })
        .collect();
    let mut calling = Vec::new();
    for &rpc in beside {
        for (number, person) in (0..).zip(&cheap) {
            let first = started + PACE * number;
            calling.push((rpc, tokio::spawn(call_for(person.clone(), rpc, first, within, PACE * CHEAP_CALLERS))));
        }
    }
    tokio::time::sleep(within).await;
    stop.cancel();
    let elapsed = started.elapsed();
    let storm = Outcome::join(join_all(storming).await.into_iter().map(Result::unwrap).collect());
    let mut report = json!({ "storm": storm.report(elapsed) });
    let mut outcomes = HashMap::<_, Vec<_>>::new();
    for (rpc, calls) in calling {
        outcomes.entry(rpc).or_default().push(calls.await.unwrap());
    }
    for (rpc, outcomes) in outcomes {
        report[rpc.name()] = Outcome::join(outcomes).report(elapsed);
    }
    report
}

/// A sign-up with the password that was the most expensive to check of all that a search has tried.
fn hostile() -> SignUpRequest {
    let name = new_name();
    SignUpRequest {
        email: format!("{name}@example.com"),
        username: name,
        password: "1|1|1k|11|1|4@8({[<369!1|0$5+7%2".repeat(4),
    }
}
