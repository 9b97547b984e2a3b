//! The load and the limits of `bench/run`. Each command prints one line of JSON.
//!
//!     load argon2         Argon2id alone, as fast as the machine computes it
//!     load limit-server   a server of tonic alone, or of tonic and one SELECT
//!     load calls          clients that call one RPC without pause, or at a steady pace
//!     load storm          clients that log in without pause, and cheap calls at a steady pace beside them

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a benchmark may panic")]

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use argon2::{Algorithm, Argon2, Block, Params, Version};
use clap::{Parser, ValueEnum};
use futures_util::future::join_all;
use postern::{
    domain::env::Env,
    proto::{
        GetMeRequest, GetMeResponse, LoginRequest, LoginResponse, LogoutRequest, LogoutResponse, RefreshRequest,
        RefreshResponse, SignUpRequest, SignUpResponse, User,
        auth_service_client::AuthServiceClient,
        auth_service_server::{AuthService, AuthServiceServer},
    },
};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, PgPool, Row as _, postgres::PgPoolOptions};
use tokio_util::sync::CancellationToken;
use tonic::{
    Code, Request, Response, Status,
    transport::{Channel, Endpoint, Server},
};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use uuid::Uuid;

/// The default parameters of Postern.
const MEMORY_KIB: u32 = 19_456;
const ITERATIONS: u32 = 2;
const PASSWORD: &str = "correct horse battery staple";
/// The pause between two cheap calls of one kind, long enough that these calls are no load.
const PACE: Duration = Duration::from_millis(4);

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
    Storm {
        #[arg(long)]
        address: String,
        #[arg(long)]
        clients: usize,
        #[arg(long)]
        seconds: u64,
        /// What the clients send: logins, or sign-ups with passwords that are expensive to judge.
        #[arg(long, default_value = "login")]
        of: Storm,
        /// The cheap calls at a steady pace beside it.
        #[arg(long, value_delimiter = ',')]
        beside: Vec<Cheap>,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum Rpc {
    Login,
    GetMe,
    Refresh,
    /// GetMe of the limit server, which wants no token.
    Limit,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Storm {
    Login,
    HostileSignUp,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Cheap {
    GetMe,
    Refresh,
    Health,
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
            Server::builder().add_service(AuthServiceServer::new(limit)).serve(address).await.unwrap();
            Value::Null
        }
        Command::Calls { address, rpc, clients, seconds, pace } => {
            calls(&address, rpc, clients, Duration::from_secs(seconds), Duration::from_micros(pace)).await
        }
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

/// What a server can do at most: it answers without checking anything, or with one SELECT.
struct Limit {
    pool: Option<PgPool>,
    statement: String,
    session: Option<Uuid>,
    user: Option<Uuid>,
}

#[tonic::async_trait]
impl AuthService for Limit {
    async fn get_me(&self, _: Request<GetMeRequest>) -> Result<Response<GetMeResponse>, Status> {
        let mut user = User { username: "ada".to_owned(), email: "ada@example.com".to_owned(), ..User::default() };
        if let Some(pool) = &self.pool {
            let query = sqlx::query(AssertSqlSafe(self.statement.clone())).bind(self.session).bind(self.user);
            let row = query.fetch_one(pool).await.map_err(|error| Status::internal(error.to_string()))?;
            user.id = row.get::<Uuid, _>(0).to_string();
            user.username = row.get(1);
            user.email = row.get(2);
        }
        Ok(Response::new(GetMeResponse { user: Some(user) }))
    }

    async fn sign_up(&self, _: Request<SignUpRequest>) -> Result<Response<SignUpResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn login(&self, _: Request<LoginRequest>) -> Result<Response<LoginResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn refresh(&self, _: Request<RefreshRequest>) -> Result<Response<RefreshResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn logout(&self, _: Request<LogoutRequest>) -> Result<Response<LogoutResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

/// Somebody with an account, a session and a connection.
#[derive(Clone)]
struct Person {
    client: Client,
    login: LoginRequest,
    access_token: String,
    refresh_token: String,
}

impl Person {
    async fn new(address: &str) -> Self {
        let mut client = connect(address).await;
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
        Self { client, login, access_token: tokens.access_token, refresh_token: tokens.refresh_token }
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
            Rpc::Limit => self.client.get_me(GetMeRequest {}).await.map(drop),
        }
    }
}

/// Somebody new comes in the middle of a storm too.
async fn wait_for_room(refused: &Status) {
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    tokio::time::sleep(Duration::from_millis(50)).await;
}

/// A username that nobody has.
fn new_name() -> String {
    format!("load-{}", Env::system().uuid().unwrap().simple())
}

async fn connect(address: &str) -> Client {
    AuthServiceClient::new(Endpoint::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap())
}

/// People, a few at a time: each needs two hashes.
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
        Rpc::Limit => {
            let client = |client| Person {
                client,
                login: LoginRequest::default(),
                access_token: String::new(),
                refresh_token: String::new(),
            };
            join_all((0..clients).map(|_| connect(address))).await.into_iter().map(client).collect()
        }
        Rpc::Login | Rpc::GetMe | Rpc::Refresh => people(address, clients).await,
    };
    eprintln!("ready");
    let started = Instant::now();
    let running = people.into_iter().map(|person| tokio::spawn(call_for(person, rpc, within, pace)));
    let outcomes = join_all(running).await.into_iter().map(Result::unwrap).collect();
    Outcome::join(outcomes).report(started.elapsed())
}

/// Calls for a while, each time when it is due. The time of a call counts from then, so that a server that stands still
/// shows in every call that it delays.
async fn call_for(mut person: Person, rpc: Rpc, within: Duration, pace: Duration) -> Outcome {
    let (started, mut outcome) = (Instant::now(), Outcome::default());
    let mut due = started;
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

async fn storm(address: &str, clients: usize, within: Duration, of: Storm, beside: &[Cheap]) -> Value {
    let cheap = people(address, 2).await;
    let crowd = if of == Storm::Login { people(address, clients.min(64)).await } else { Vec::new() };
    let connections = join_all((0..clients).map(|_| connect(address))).await;
    eprintln!("ready");
    let (started, stop) = (Instant::now(), CancellationToken::new());
    let crowd = Arc::new(crowd);
    let storming: Vec<_> = connections
        .into_iter()
        .enumerate()
        .map(|(number, mut client)| {
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
    let [me, refresh] = [0, 1].map(|number| cheap[number].clone());
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    let health = HealthClient::new(endpoint.connect().await.unwrap());
    let mut cheap = Vec::new();
    for call in beside {
        let (name, task) = match call {
            Cheap::GetMe => ("get_me", tokio::spawn(call_for(me.clone(), Rpc::GetMe, within, PACE))),
            Cheap::Refresh => ("refresh", tokio::spawn(call_for(refresh.clone(), Rpc::Refresh, within, PACE))),
            Cheap::Health => ("health", tokio::spawn(check_for(health.clone(), within))),
        };
        cheap.push((name, task));
    }
    tokio::time::sleep(within).await;
    stop.cancel();
    let elapsed = started.elapsed();
    let storm = Outcome::join(join_all(storming).await.into_iter().map(Result::unwrap).collect());
    let mut report = json!({ "storm": storm.report(elapsed) });
    for (name, task) in cheap {
        report[name] = Outcome::join(vec![task.await.unwrap()]).report(elapsed);
    }
    report
}

/// A sign-up whose password is as expensive to judge as one can be, as far as a search has found.
fn hostile() -> SignUpRequest {
    let name = new_name();
    SignUpRequest {
        email: format!("{name}@example.com"),
        username: name,
        password: "1|1|1k|11|1|4@8({[<369!1|0$5+7%2".repeat(4),
    }
}

async fn check_for(mut client: HealthClient<Channel>, within: Duration) -> Outcome {
    let (started, mut outcome) = (Instant::now(), Outcome::default());
    let mut due = started;
    while started.elapsed() < within {
        due += PACE;
        tokio::time::sleep_until(due.into()).await;
        let answer = client.check(HealthCheckRequest { service: String::new() }).await.map(drop);
        outcome.add(answer, due.elapsed());
    }
    outcome
}
