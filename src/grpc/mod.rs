//! The gRPC surface: every service and every layer, in order, each constraint with its reason.
//! Below this stands the domain; above it the listener, and `http`, whose REST calls enter through the same stack.

mod access;
mod account;
mod admin;
mod auth;
mod authenticate;
mod context;
mod limits;
mod request;
mod response;
mod status;

use std::sync::Arc;

use axum::{
    Router,
    middleware::{from_fn, from_fn_with_state},
};
use tonic::service::Routes;
use tonic_health::{ServingStatus, server::HealthReporter};
use tower::ServiceBuilder;

use crate::{
    domain::{env::Env, service::Service},
    error::Error,
    proto::{
        self, account_service_server::AccountServiceServer, admin_service_server::AdminServiceServer,
        auth_service_server::AuthServiceServer,
    },
};

pub use access::{AccessRules, contract_rules, declared_access};
pub use context::{REQUEST_ID, request_id};
pub use limits::{LONGEST_CALL, MAX_MESSAGE};
pub use status::{ERROR_DOMAIN, code_name, reason_name};

/// The services whose health is reported; `""` stands for the server as a whole (grpc.health.v1).
const HEALTH_OF: [&str; 4] =
    ["", "postern.auth.v1.AuthService", "postern.auth.v1.AccountService", "postern.auth.v1.AdminService"];

/// Whether the services can do their work, as `grpc.health.v1` tells it.
#[derive(Debug, Clone)]
pub struct Health(HealthReporter);

impl Health {
    /// Sets every service at once: all of them stand and fall with the store.
    pub async fn set(&self, serving: bool) {
        let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        for service in HEALTH_OF {
            self.0.set_service_status(service, status).await;
        }
    }
}

/// The whole gRPC surface as one service, and the handle to its health, which starts as NOT_SERVING.
pub async fn router(service: Arc<Service>, env: Env, reflection: bool) -> Result<(Router, Health), Error> {
    let (reporter, health_service) = tonic_health::server::health_reporter();
    let health = Health(reporter);
    health.set(false).await;

    let auth = AuthServiceServer::new(auth::AuthRpcs::new(Arc::clone(&service))).max_decoding_message_size(MAX_MESSAGE);
    let account = AccountServiceServer::new(account::AccountRpcs::new(Arc::clone(&service)))
        .max_decoding_message_size(MAX_MESSAGE);
    let admin =
        AdminServiceServer::new(admin::AdminRpcs::new(Arc::clone(&service))).max_decoding_message_size(MAX_MESSAGE);
    let mut routes =
        Routes::default().add_service(health_service).add_service(auth).add_service(account).add_service(admin);
    if reflection {
        // Old and new clients ask different versions; grpcurl asks v1 and falls back.
        let configure = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(proto::CONTRACT)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                // What errors carry, so that generic clients can print it.
                .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
        };
        routes = routes
            .add_service(configure().build_v1().map_err(Error::internal)?)
            .add_service(configure().build_v1alpha().map_err(Error::internal)?);
    }

    let rules = contract_rules()?;
    let layers = ServiceBuilder::new()
        // Outermost, so that whatever is logged below carries the request id.
        .layer(from_fn_with_state((env, context::MeasuredRpcs::new(&rules)), context::request_context))
        // Before anything reads the request as what it does not claim to be.
        .layer(from_fn(context::require_grpc_content_type))
        // Outside of everything of ours that could panic.
        .layer(from_fn(context::catch_panics))
        // Outside of the services, whose decoding errors it rewrites.
        .layer(from_fn(context::normalize_errors))
        // Before any work is done for the call.
        .layer(from_fn_with_state(limits::CallSlots::default(), limits::bound_concurrency))
        // Around the rest, so that waiting counts too.
        .layer(from_fn(limits::bound_time))
        // Says who calls…
        .layer(from_fn_with_state(service, authenticate::authenticate))
        // …and, innermost, whether they may. No service is reachable but through here.
        .layer(from_fn_with_state(Arc::new(rules), access::authorize));
    Ok((routes.into_axum_router().layer(layers), health))
}
