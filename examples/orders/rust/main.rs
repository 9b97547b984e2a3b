//! A small service of orders that accepts Postern's access tokens: a person reads and makes orders, a service reads all of
//! them, and an admin deletes one. `clients/rust/README.md` starts it.
//!
//! It verifies tokens itself and follows the revocations, so that a logout counts within a second.

use std::{
    collections::BTreeMap,
    env,
    error::Error,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{
    Extension, Json, Router,
    extract::{Path, State},
    http::StatusCode,
    routing::{delete, get, post},
};
use postern_client::{
    Caller, Credentials, Demand, FeedOptions, Guard, RevocationFeed, SubjectType, TokenSource, Verifier, WhenUnknown,
    endpoint,
};
use serde::{Deserialize, Serialize};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};

#[derive(Clone, Serialize)]
struct Order {
    id: u64,
    owner: String,
    item: String,
}

#[derive(Deserialize)]
struct NewOrder {
    item: String,
}

#[derive(Serialize)]
struct Orders {
    orders: Vec<Order>,
}

type Store = Arc<Mutex<BTreeMap<u64, Order>>>;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let postern = endpoint(format!("http://{}", setting("POSTERN_GRPC_ADDR")?))?.connect_lazy();
    let credentials = Credentials::Service {
        client_id: setting("POSTERN_CLIENT_ID")?,
        client_secret: match setting("POSTERN_CLIENT_SECRET_FILE") {
            Ok(file) => std::fs::read_to_string(file)?.trim().to_owned(),
            Err(_) => setting("POSTERN_CLIENT_SECRET")?,
        },
    };
    let when_unknown = match setting("ORDERS_WHEN_REVOCATIONS_UNKNOWN")?.as_str() {
        "refuse" => WhenUnknown::Refuse,
        "accept" => WhenUnknown::Accept,
        _ => return Err("ORDERS_WHEN_REVOCATIONS_UNKNOWN is refuse or accept".into()),
    };
    let staleness = setting("ORDERS_MAX_STALENESS_SECONDS").map_or(Ok(30), |text| text.parse())?;

    let tokens = TokenSource::new(postern.clone(), credentials);
    let options = FeedOptions::new(when_unknown).max_staleness(Duration::from_secs(staleness));
    let feed = RevocationFeed::start(postern, tokens, options);
    let verifier = Verifier::builder(setting("POSTERN_ISSUER")?, setting("POSTERN_AUDIENCE")?);
    let guard = Guard::new(verifier.revocations(feed.clone()).build()?);

    let routes = Router::new()
        .route("/orders", get(list).layer(guard.http(Demand::authenticated())))
        .route("/orders", post(create).layer(guard.http(Demand::person())))
        .route("/orders/{id}", delete(remove).layer(guard.http(Demand::authenticated().role("admin"))))
        .route("/healthz", get(|| async { "ok" }))
        .with_state(Store::default());
    let listener = TcpListener::bind(setting("ORDERS_ADDR")?).await?;
    feed.ready().await;
    println!("orders is ready");
    let mut stop = signal(SignalKind::terminate())?;
    axum::serve(listener, routes).with_graceful_shutdown(async move { _ = stop.recv().await }).await?;
    Ok(())
}

async fn list(State(store): State<Store>, Extension(caller): Extension<Arc<Caller>>) -> Json<Orders> {
    let sees_all = caller.subject_type == SubjectType::Service;
    let store = store.lock().unwrap_or_else(PoisonError::into_inner);
    Json(Orders { orders: store.values().filter(|order| sees_all || order.owner == caller.subject).cloned().collect() })
}

async fn create(
    State(store): State<Store>,
    Extension(caller): Extension<Arc<Caller>>,
    Json(new): Json<NewOrder>,
) -> (StatusCode, Json<Order>) {
    let mut store = store.lock().unwrap_or_else(PoisonError::into_inner);
    let id = store.last_key_value().map_or(1, |(last, _)| last + 1);
    let order = Order { id, owner: caller.subject.clone(), item: new.item };
    store.insert(id, order.clone());
    (StatusCode::CREATED, Json(order))
}

async fn remove(State(store): State<Store>, Path(id): Path<u64>) -> StatusCode {
    let removed = store.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    if removed.is_some() { StatusCode::NO_CONTENT } else { StatusCode::NOT_FOUND }
}

#[expect(clippy::disallowed_methods, reason = "a small service reads its settings where it starts")]
fn setting(name: &str) -> Result<String, String> {
    env::var(name).map_err(|_| format!("{name} is missing"))
}
