//! `WatchRevocations`: a stream that is asked for its next message when its client has room for it, and keeps nothing else.
//! It lives as long as its token or its client certificate is accepted and its connection goes on.

use std::{
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::stream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, codegen::tokio_stream::Stream};

use crate::{
    domain::{
        role::Role,
        service::{
            Service,
            watch::{Change, Event, Notice, RevocationStream},
        },
        streams::Subscriber,
        token::AccessTokenError,
    },
    error::Error,
    listen::ConnectionEnds,
    proto::{self, watch_revocations_response},
    tls::ServiceCertificate,
};

use super::{
    authenticate::bearer_token,
    request::{optional_caller, timestamp},
};

/// The time between two heartbeats.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// Why a stream ends whose connection has reached its age, or whose server stops.
const CONNECTION_ENDS: &str = "its connection ends";
/// Why a stream ends whose client certificate has expired, or is of an authority that was taken away.
const CERTIFICATE_ENDS: &str = "its client certificate is no longer accepted";
/// After how many messages in a row it is looked at whether the credential is still accepted.
const LOOK_AT_CREDENTIAL: u32 = 64;

/// The messages of a stream.
pub type Revocations = Pin<Box<dyn Stream<Item = Result<proto::WatchRevocationsResponse, Status>> + Send>>;

/// Begins a stream.
pub async fn revocations(
    service: Arc<Service>,
    request: Request<proto::WatchRevocationsRequest>,
) -> Result<Response<Revocations>, Status> {
    let (credential, subscriber) = credential(&request)?;
    let connection = request.extensions().get::<ConnectionEnds>().map(|ends| ends.0.clone()).unwrap_or_default();
    let stream = service.watch_revocations(&request.into_inner().resume_cursor, subscriber).await?;
    let watch = Watch { service, stream, credential, connection, last_heartbeat: None, in_a_row: 0, end: "client" };
    let messages = stream::unfold(Some(watch), |watch| async move {
        let mut watch = watch?;
        match watch.next().await {
            Ok(message) => Some((Ok(message), Some(watch))),
            Err(error) => {
                watch.end = end_of(&error);
                Some((Err(error.into()), None))
            }
        }
    });
    Ok(Response::new(Box::pin(messages)))
}

/// What the access layer has let in. Without a caller it was the certificate.
fn credential<T>(request: &Request<T>) -> Result<(Credential, Subscriber), Error> {
    if let Some(caller) = optional_caller(request) {
        let token = bearer_token(request.metadata().as_ref()).ok().flatten().unwrap_or_default().to_owned();
        return Ok((Credential::Token(token), Subscriber::Account(caller.account())));
    }
    let certificate = request.extensions().get::<ServiceCertificate>().cloned();
    let certificate = certificate.ok_or_else(|| Error::internal("a stream was let in without a credential"))?;
    let subscriber = Subscriber::Certificate(certificate.identity().clone());
    Ok((Credential::Certificate(certificate), subscriber))
}

/// What a stream was begun with.
enum Credential {
    Token(String),
    Certificate(ServiceCertificate),
}

impl Credential {
    fn ensure_accepted(&self, service: &Service) -> Result<(), Error> {
        match self {
            Self::Token(token) => match service.identify(token) {
                // The heartbeats tell how old the knowledge of this replica is.
                Ok(_) | Err(AccessTokenError::RevocationUnknown) => Ok(()),
                Err(fault) => Err(fault.into()),
            },
            Self::Certificate(certificate) if certificate.holds() => Ok(()),
            Self::Certificate(_) => Err(Error::StreamEnded(CERTIFICATE_ENDS)),
        }
    }

    /// When it has to be looked at again, whatever happens.
    fn time_left(&self, service: &Service) -> Result<Duration, Error> {
        match self {
            Self::Token(token) => Ok(service.token_time_left(token)?),
            Self::Certificate(_) => Ok(HEARTBEAT),
        }
    }
}

struct Watch {
    service: Arc<Service>,
    stream: RevocationStream,
    credential: Credential,
    /// Cancelled when the connection is to end.
    connection: CancellationToken,
    last_heartbeat: Option<Instant>,
    /// How many messages were sent since the credential was looked at.
    in_a_row: u32,
    /// Why the stream ends, for the metrics.
    end: &'static str,
}

impl Watch {
    async fn next(&mut self) -> Result<proto::WatchRevocationsResponse, Error> {
        loop {
            self.ensure_goes_on()?;
            if let Some(notice) = self.service.next_revocation(&mut self.stream).await? {
                self.in_a_row += 1;
                return Ok(message(notice));
            }
            self.in_a_row = 0;
            let rest = self.last_heartbeat.map_or(Duration::ZERO, |last| HEARTBEAT.saturating_sub(last.elapsed()));
            if rest.is_zero() {
                self.last_heartbeat = Some(Instant::now());
                return Ok(message(self.service.heartbeat(&self.stream)));
            }
            let credential_end = self.credential.time_left(&self.service)?;
            tokio::select! {
                () = self.stream.added() => {}
                () = self.connection.cancelled() => {}
                () = tokio::time::sleep(rest.min(credential_end)) => {}
            }
        }
    }

    fn ensure_goes_on(&self) -> Result<(), Error> {
        if self.connection.is_cancelled() {
            return Err(Error::StreamEnded(CONNECTION_ENDS));
        }
        if !self.in_a_row.is_multiple_of(LOOK_AT_CREDENTIAL) {
            return Ok(());
        }
        self.credential.ensure_accepted(&self.service)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        metrics::counter!("postern_revocation_streams_ended_total", "reason" => self.end).increment(1);
    }
}

fn end_of(error: &Error) -> &'static str {
    match error {
        Error::StreamEnded(CONNECTION_ENDS | CERTIFICATE_ENDS) => "connection",
        Error::StreamEnded(_) => "slow",
        Error::CursorExpired => "restored",
        Error::StoreUnavailable(_) => "database",
        Error::Internal(_) => "fault",
        _ => "token",
    }
}

fn message(notice: Notice) -> proto::WatchRevocationsResponse {
    use watch_revocations_response::Event as Sent;
    let (event, times) = match notice.event {
        Event::CaughtUp { complete_time } => {
            (Sent::Heartbeat(proto::Heartbeat { complete_time: complete_time.map(timestamp) }), None)
        }
        Event::Revoked { what, revoke_time, forget_time } => {
            let event = match what {
                Change::SessionEnded(session) => {
                    Sent::SessionEnded(proto::SessionEnded { session_id: session.to_string() })
                }
                Change::Roles(account, roles) => Sent::RolesChanged(proto::RolesChanged {
                    user_id: account.to_string(),
                    disabled: roles.is_none(),
                    roles: roles.unwrap_or_default().iter().map(Role::to_string).collect(),
                }),
            };
            (event, Some((timestamp(revoke_time), timestamp(forget_time))))
        }
    };
    let (revoke_time, forget_time) = times.unzip();
    proto::WatchRevocationsResponse { cursor: notice.cursor, event: Some(event), revoke_time, forget_time }
}
