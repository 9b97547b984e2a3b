//! `grpc.health.v1`: tonic-health, but for watching a service that is not known. health.proto wants SERVICE_UNKNOWN and
//! an open stream; tonic-health ends the call with NOT_FOUND.

use std::pin::Pin;

use tonic::{
    Code, Request, Response, Status,
    codegen::tokio_stream::{self, Stream, StreamExt as _},
};
use tonic_health::{
    pb::{
        HealthCheckRequest, HealthCheckResponse,
        health_check_response::ServingStatus,
        health_server::{Health, HealthServer},
    },
    server::{HealthReporter, HealthService},
};

/// The service that reports what the reporter knows.
pub fn server(reporter: HealthReporter) -> HealthServer<impl Health> {
    HealthServer::new(HealthRpcs(HealthService::from_health_reporter(reporter)))
}

struct HealthRpcs(HealthService);

#[tonic::async_trait]
impl Health for HealthRpcs {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        self.0.check(request).await
    }

    async fn watch(&self, request: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let statuses: Self::WatchStream = match self.0.watch(request).await {
            Ok(known) => Box::pin(known.into_inner()),
            // No service is added while the server runs, so the status never changes.
            Err(status) if status.code() == Code::NotFound => {
                let unknown = HealthCheckResponse { status: ServingStatus::ServiceUnknown.into() };
                Box::pin(tokio_stream::once(Ok(unknown)).chain(tokio_stream::pending()))
            }
            Err(status) => return Err(status),
        };
        Ok(Response::new(statuses))
    }
}
