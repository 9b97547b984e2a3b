//! The gRPC API: all services, within the layers of `layers`. REST calls pass the same layers: see `http`.

mod access;
mod account;
mod admin;
mod auth;
mod authenticate;
mod call_log;
mod context;
mod decision;
mod ext_authz;
mod health;
mod layers;
mod limits;
mod next;
mod reflection;
mod request;
mod response;
mod status;
mod token;
mod watch;

use std::sync::Arc;

use axum::Router;
use tonic::{codec::CompressionEncoding, service::Routes};
use tonic_health::{ServingStatus, server::HealthReporter};
use tower::ServiceExt as _;

use crate::{
    domain::{env::Env, service::Service},
    error::Error,
    proto::{
        account_service_server::AccountServiceServer, admin_service_server::AdminServiceServer,
        auth_service_server::AuthServiceServer,
        external::envoy::service::auth::v3::authorization_server::AuthorizationServer,
        token_service_server::TokenServiceServer,
    },
};

pub use access::{AccessRules, ServicesOnly, contract_rules, declared_access};
pub use authenticate::ClientCredentials;
pub use call_log::{Unanswered, watch_calls};
pub use context::{REQUEST_ID, assign_request_id, oversized_head};
pub use decision::{Decision, decide};
pub use limits::{FRAME_HEADER, LONGEST_CALL, MAX_MESSAGE, OVERLOAD_RETRY, RECEIVED_AT_ONCE};
pub use reflection::contract;
pub use status::{ERROR_DOMAIN, code_name, is_spent_link, reason_name};

/// The services whose health is reported. `""` is the server as a whole (grpc.health.v1).
const HEALTH_OF: [&str; 6] = [
    "",
    "envoy.service.auth.v3.Authorization",
    "postern.auth.v1.AuthService",
    "postern.auth.v1.AccountService",
    "postern.auth.v1.AdminService",
    "postern.auth.v1.TokenService",
];

/// The health of the services, as `grpc.health.v1` reports it.
#[derive(Debug, Clone)]
pub struct Health(HealthReporter);

impl Health {
    /// Sets the status of every service: all of them depend on the store.
    pub async fn set(&self, serving: bool) {
        let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        for service in HEALTH_OF {
            self.0.set_service_status(service, status).await;
        }
    }
}

/// A service that takes messages of a bounded size, plain or compressed with gzip. The bound holds after decompression
/// too. The generated servers have these methods, but no trait for them.
macro_rules! bounded {
    ($server:expr) => {
        bounded!($server, MAX_MESSAGE)
    };
    ($server:expr, $most:expr) => {
        $server.max_decoding_message_size($most).accept_compressed(CompressionEncoding::Gzip)
    };
}

/// The gRPC API as one router, and the handle to its health, which starts as NOT_SERVING.
pub async fn router(service: Arc<Service>, env: Env, reflection: bool) -> Result<(Router, Health), Error> {
    let reporter = HealthReporter::new();
    let health = Health(reporter.clone());
    health.set(false).await;

    let health_service = bounded!(health::server(reporter));
    let auth = bounded!(AuthServiceServer::new(auth::AuthRpcs::new(Arc::clone(&service))));
    let account = bounded!(AccountServiceServer::new(account::AccountRpcs::new(Arc::clone(&service))));
    let admin = bounded!(AdminServiceServer::new(admin::AdminRpcs::new(Arc::clone(&service))));
    let token = bounded!(TokenServiceServer::new(token::TokenRpcs::new(Arc::clone(&service))));
    let check = bounded!(AuthorizationServer::new(ext_authz::CheckRpc::new(Arc::clone(&service))));
    let services = Routes::default()
        .add_service(health_service)
        .add_service(auth)
        .add_service(account)
        .add_service(admin)
        .add_service(token)
        .add_service(check);
    let router = if reflection {
        // Some clients use v1 and some v1alpha; grpcurl tries v1 first.
        let server = bounded!(reflection::server()?, limits::MAX_REFLECTION);
        let v1alpha = server.clone().map_request(reflection::to_v1);
        services.add_service(server).into_axum_router().route_service(reflection::V1ALPHA, v1alpha)
    } else {
        services.into_axum_router()
    };

    Ok((layers::around(router, service, env, contract_rules()?), health))
}
