//! Measures a cheap call (GetMe) while logins saturate the machine, and the rate of logins.
//!
//!     cargo bench --bench cheap_calls
//!
//! The whole service runs in this process on SQLite in a temporary directory, with the default Argon2id parameters;
//! the clients are tonic's, over loopback. Two rounds of ten seconds: without logins, and with 32 clients logging in.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a benchmark may panic")]

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use clap::Parser;
use postern::{
    app,
    config::Config,
    domain::env::Env,
    proto::{GetMeRequest, LoginRequest, SignUpRequest, auth_service_client::AuthServiceClient},
};
use tokio_util::sync::CancellationToken;
use tonic::{
    Request,
    transport::{Channel, Endpoint},
};

const ROUND: Duration = Duration::from_secs(10);
const LOGIN_CLIENTS: usize = 32;
/// The time between two cheap calls, long enough that these calls are no load.
const PACE: Duration = Duration::from_millis(2);

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    config: Config,
}

type Client = AuthServiceClient<Channel>;

#[tokio::main]
async fn main() {
    let directory = tempfile::tempdir().unwrap();
    let data_dir = directory.path().to_str().unwrap();
    let config = Arguments::parse_from([
        "bench",
        "--grpc-addr=127.0.0.1:0",
        "--http-addr=127.0.0.1:0",
        "--ops-addr=127.0.0.1:0",
        "--data-dir",
        data_dir,
    ])
    .config;
    let app = app::build(&config, Env::system()).await.unwrap();
    let address = format!("http://{}", app.addresses().grpc);
    let stop = CancellationToken::new();
    let server = tokio::spawn(app.run(stop.clone()));

    let mut client = connect(&address).await;
    let password = "correct horse battery staple".to_owned();
    let email = "bench@example.com".to_owned();
    let account = SignUpRequest { username: "bench".to_owned(), email: email.clone(), password: password.clone() };
    client.sign_up(account).await.unwrap();
    let login = LoginRequest { email, password };
    let token = client.login(login.clone()).await.unwrap().into_inner().tokens.unwrap().access_token;

    report("quiet", &trickle(client.clone(), &token).await, None);

    let (logins, flood) = (Arc::new(AtomicU64::new(0)), CancellationToken::new());
    let mut clients = Vec::new();
    for _ in 0..LOGIN_CLIENTS {
        let mut client = connect(&address).await;
        let (login, logins, flood) = (login.clone(), Arc::clone(&logins), flood.clone());
        clients.push(tokio::spawn(async move {
            while !flood.is_cancelled() {
                if client.login(login.clone()).await.is_ok() {
                    logins.fetch_add(1, Ordering::Relaxed);
                }
            }
        }));
    }
    let under_load = trickle(client, &token).await;
    flood.cancel();
    for client in clients {
        client.await.unwrap();
    }
    report("logins", &under_load, Some(logins.load(Ordering::Relaxed)));
    stop.cancel();
    server.await.unwrap();
}

async fn connect(address: &str) -> Client {
    AuthServiceClient::new(Endpoint::from_shared(address.to_owned()).unwrap().connect().await.unwrap())
}

/// Calls GetMe at a steady pace for one round. Returns the sorted durations of the calls.
async fn trickle(mut client: Client, token: &str) -> Vec<Duration> {
    let (started, mut pace) = (Instant::now(), tokio::time::interval(PACE));
    let mut times = Vec::new();
    while started.elapsed() < ROUND {
        pace.tick().await;
        let mut request = Request::new(GetMeRequest {});
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        let called = Instant::now();
        client.get_me(request).await.unwrap();
        times.push(called.elapsed());
    }
    times.sort_unstable();
    times
}

fn report(round: &str, times: &[Duration], logins: Option<u64>) {
    let at = |share: usize| times[(times.len() - 1) * share / 1000];
    let logins = logins.map_or(String::new(), |count| format!(", {} logins/s", count / ROUND.as_secs()));
    println!(
        "{round:>7}: GetMe p50 {:?}, p99 {:?}, p99.9 {:?} ({} calls{logins})",
        at(500),
        at(990),
        at(999),
        times.len()
    );
}
