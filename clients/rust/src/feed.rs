//! Follows the revocations of Postern for as long as it lives: resumes where it was when the stream ends.

use std::{sync::Arc, time::Duration};

use tokio::{sync::watch, task::AbortHandle, time::timeout};
use tonic::{Code, transport::Channel};
use tower::Layer as _;

use crate::{
    clock::Clock,
    error::{CallError, Reason, VerifyError},
    proto::{WatchRevocationsRequest, token_service_client::TokenServiceClient, watch_revocations_response::Event},
    retry,
    revocations::{Revocations, WhenUnknown},
    tokens::{AuthorizeLayer, Authorized, TokenSource},
    verifier::Caller,
};

/// Heartbeats come every five seconds. A stream that is silent for longer than two of them is broken.
const SILENCE: Duration = Duration::from_secs(11);

/// How a feed behaves.
#[derive(Debug, Clone)]
pub struct FeedOptions {
    when_unknown: WhenUnknown,
    max_staleness: Duration,
    clock: Clock,
}

impl FeedOptions {
    /// What happens while revocations are unknown has to be chosen.
    pub fn new(when_unknown: WhenUnknown) -> Self {
        Self { when_unknown, max_staleness: Duration::from_secs(30), clock: Clock::system() }
    }

    /// After how long without news revocations are unknown. Default: 30 s, as in Postern itself. It should be more than
    /// the five seconds between two heartbeats.
    #[must_use]
    pub fn max_staleness(mut self, time: Duration) -> Self {
        self.max_staleness = time;
        self
    }

    /// Another clock, for tests.
    #[must_use]
    pub fn clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }
}

/// The revocations, kept up to date by a task that ends with the last clone of this handle.
#[derive(Debug, Clone)]
pub struct RevocationFeed(Arc<Following>);

#[derive(Debug)]
struct Following {
    revocations: Arc<Revocations>,
    caught_up: watch::Receiver<bool>,
    task: AbortHandle,
}

impl Drop for Following {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl RevocationFeed {
    /// Begins to follow, with the token of a service account. It must be called within a Tokio runtime.
    pub fn start(channel: Channel, tokens: TokenSource, options: FeedOptions) -> Self {
        let revocations = Arc::new(Revocations::new(options.when_unknown, options.max_staleness, options.clock));
        let (tell, caught_up) = watch::channel(false);
        let task = tokio::spawn(follow(channel, tokens, Arc::clone(&revocations), tell)).abort_handle();
        Self(Arc::new(Following { revocations, caught_up, task }))
    }

    /// Waits until everything that was revoked is known for the first time.
    pub async fn ready(&self) {
        let mut caught_up = self.0.caught_up.clone();
        // The sender lives as long as the task, and the task as long as this handle.
        let _ = caught_up.wait_for(|caught_up| *caught_up).await;
    }

    /// Whether everything that was revoked until a moment ago is known.
    pub fn is_complete(&self) -> bool {
        self.0.revocations.is_complete()
    }

    pub(crate) fn check(&self, caller: &Arc<Caller>) -> Result<Arc<Caller>, VerifyError> {
        self.0.revocations.check(caller)
    }
}

/// Runs until it is aborted.
async fn follow(channel: Channel, tokens: TokenSource, revocations: Arc<Revocations>, caught_up: watch::Sender<bool>) {
    let mut client = TokenServiceClient::new(AuthorizeLayer::new(tokens.clone()).layer(channel));
    let mut failures = 0;
    loop {
        let error = read(&mut client, &revocations, &caught_up, &mut failures).await;
        if error.code == Code::Unauthenticated {
            tokens.invalidate();
        }
        if error.is(&Reason::CursorExpired) || (error.code == Code::InvalidArgument) {
            // What is remembered stays: it was true.
            revocations.forget_cursor();
        }
        tokio::time::sleep(retry::pause(failures, &error)).await;
        failures += 1;
    }
}

/// Reads one stream to its end.
async fn read(
    client: &mut TokenServiceClient<Authorized<Channel>>,
    revocations: &Revocations,
    caught_up: &watch::Sender<bool>,
    failures: &mut u32,
) -> CallError {
    let silent = || CallError::from(tonic::Status::unavailable("the stream of revocations is silent"));
    let request = WatchRevocationsRequest { resume_cursor: revocations.cursor() };
    let mut stream = match timeout(SILENCE, client.watch_revocations(request)).await {
        Ok(Ok(answer)) => answer.into_inner(),
        Ok(Err(status)) => return status.into(),
        Err(_) => return silent(),
    };
    loop {
        match timeout(SILENCE, stream.message()).await {
            Ok(Ok(Some(message))) => {
                let is_heartbeat = matches!(message.event, Some(Event::Heartbeat(_)));
                revocations.apply(message);
                if is_heartbeat {
                    *failures = 0;
                    caught_up.send_replace(true);
                }
            }
            Ok(Ok(None)) => return tonic::Status::unavailable("the stream of revocations has ended").into(),
            Ok(Err(status)) => return status.into(),
            Err(_) => return silent(),
        }
    }
}
