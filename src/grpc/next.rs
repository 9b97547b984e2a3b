//! What the layers around a call have in common.

use axum::{extract::Request, response::Response};

/// What a layer passes a call on to: the layers inside of it, and at last the services.
pub trait Next: Send {
    fn run(self, request: Request) -> impl Future<Output = Response> + Send;
}

impl<F, Answer> Next for F
where
    F: FnOnce(Request) -> Answer + Send,
    Answer: Future<Output = Response> + Send,
{
    fn run(self, request: Request) -> impl Future<Output = Response> + Send {
        self(request)
    }
}
