//! Whether a client takes the answers of its calls. HTTP/2 lets a client keep the window of a stream at zero, and the answer
//! would then wait in memory for as long as the connection lives.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use axum::body::Body;

use crate::body::{Guard, guarded};

/// The answers of one connection that wait for their client, and since when.
#[derive(Debug, Clone, Default)]
pub(super) struct Progress {
    waiting: Arc<Mutex<HashMap<u64, Instant>>>,
    next: Arc<AtomicU64>,
}

impl Progress {
    /// Follows a body: it waits for the client from the moment when it has something to send until it is asked for more.
    /// Keeps `call` as long as the body.
    pub(super) fn follow<C: Send + Unpin + 'static>(&self, body: Body, call: C) -> Body {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.lock().insert(number, Instant::now());
        guarded(body, Followed { progress: self.clone(), number, _call: call })
    }

    /// Whether an answer has waited for its client for longer than this.
    pub(super) fn is_stuck(&self, longest: Duration) -> bool {
        self.lock().values().any(|since| since.elapsed() > longest)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Instant>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Followed<C> {
    progress: Progress,
    number: u64,
    _call: C,
}

impl<C: Send + Unpin + 'static> Guard for Followed<C> {
    fn asked(&mut self, has_frame: bool) {
        let mut waiting = self.progress.lock();
        if has_frame {
            waiting.insert(self.number, Instant::now());
        } else {
            waiting.remove(&self.number);
        }
    }
}

impl<C> Drop for Followed<C> {
    fn drop(&mut self) {
        self.progress.lock().remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Bytes;
    use http_body_util::BodyExt as _;

    use super::*;

    #[tokio::test]
    async fn an_answer_waits_for_its_client_until_it_is_asked_for_more() {
        let progress = Progress::default();
        let is_stuck = || progress.is_stuck(Duration::ZERO);
        let mut answer = progress.follow(Body::from("text"), ());
        assert!(is_stuck(), "nobody has asked for it");
        assert!(answer.frame().await.is_some());
        assert!(is_stuck(), "nobody has asked for more");
        assert!(answer.frame().await.is_none());
        assert!(!is_stuck());
        drop(progress.follow(Body::from("text"), ()));
        assert!(!is_stuck(), "it was not taken, and nothing is left of it");
    }

    #[tokio::test]
    async fn a_stream_that_has_nothing_to_send_does_not_wait_for_its_client() {
        let progress = Progress::default();
        let silent = Body::from_stream(futures_util::stream::pending::<Result<Bytes, std::io::Error>>());
        let mut answer = progress.follow(silent, ());
        assert!(futures_util::poll!(std::pin::pin!(answer.frame())).is_pending());
        assert!(!progress.is_stuck(Duration::ZERO));
    }
}
