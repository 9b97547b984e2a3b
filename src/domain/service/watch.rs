//! The streams of revocations: where one begins, and what it sends next.

use std::time::Duration;

use time::OffsetDateTime;

use crate::{
    domain::{
        ids::{SessionId, UserId},
        revocation::Standing,
        role::Role,
        streams::{Place, Subscriber},
        token::AccessTokenError,
        watch::{Entry, Mark, Next, Position, Subject, Subscription},
    },
    error::Error,
};

use super::Service;

/// When to ask again for a stream, when there are as many as there may be.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// A stream of revocations.
#[derive(Debug)]
pub struct RevocationStream {
    subscription: Subscription,
    _place: Place,
}

/// A message of the stream.
#[derive(Debug)]
pub struct Notice {
    pub cursor: String,
    pub event: Event,
}

/// What a message says.
#[derive(Debug)]
pub enum Event {
    Revoked {
        what: Change,
        revoke_time: OffsetDateTime,
        forget_time: OffsetDateTime,
    },
    /// Every revocation was sent that was acknowledged before this time.
    CaughtUp {
        complete_time: Option<OffsetDateTime>,
    },
}

/// What an entry of the log changes.
#[derive(Debug)]
pub enum Change {
    SessionEnded(SessionId),
    /// `None`: the account is disabled or deleted.
    Roles(UserId, Option<Vec<Role>>),
}

impl RevocationStream {
    /// Waits until there may be something to send.
    pub async fn added(&mut self) {
        self.subscription.added().await;
    }
}

impl Service {
    /// Begins a stream after a cursor, or at the start of the log without one.
    ///
    /// The log is read first: whoever has seen an entry at another replica is not told something older here.
    pub async fn watch_revocations(&self, cursor: &str, service: Subscriber) -> Result<RevocationStream, Error> {
        let position = self.streams.cursors.read(cursor)?;
        let place = self.streams.places.take(service).ok_or(Error::Overloaded { retry_after: RETRY_AFTER })?;
        self.revocations.poll_unless_read(self.store.as_ref(), self.env.now()).await?;
        let feed = self.revocations.feed();
        let log = feed.log();
        self.ensure_is_of_this_log(position).await?;
        Ok(RevocationStream { subscription: feed.subscribe(log, position), _place: place })
    }

    /// A position is one of this log if the newest entry that it knows is in the log. One that was deleted is so old that all
    /// tokens from before it have expired.
    async fn ensure_is_of_this_log(&self, position: Position) -> Result<(), Error> {
        let (known, newest) = (position.newest, self.revocations.feed().newest());
        if known.number == 0 || known == newest {
            return Ok(());
        }
        let page = self.store.revocation_page(known.number - 1, known.number, 1).await?;
        if known.number < newest.number && page.iter().map(Mark::of).any(|mark| mark == known) {
            Ok(())
        } else {
            Err(Error::CursorExpired)
        }
    }

    /// The next message; `None` when everything has been sent.
    pub async fn next_revocation(&self, stream: &mut RevocationStream) -> Result<Option<Notice>, Error> {
        let feed = self.revocations.feed();
        loop {
            match feed.next(&mut stream.subscription) {
                Next::Send(entry) => {
                    if let Some(event) = self.event(&entry) {
                        return Ok(Some(self.notice(stream, event)));
                    }
                }
                Next::Read { after, up_to, limit } => {
                    let _reader = self.streams.readers.acquire().await.map_err(Error::internal)?;
                    let page = self.store.revocation_page(after, up_to, limit).await?;
                    stream.subscription.add_page(&page, limit);
                }
                Next::Wait => return Ok(None),
                Next::FellBehind => return Err(Error::StreamEnded("its client reads too slowly")),
                Next::AnotherLog => return Err(Error::CursorExpired),
            }
        }
    }

    /// The message that says that everything has been sent. Only right after [`Self::next_revocation`] has said so.
    pub fn heartbeat(&self, stream: &RevocationStream) -> Notice {
        self.notice(stream, Event::CaughtUp { complete_time: stream.subscription.complete_time() })
    }

    fn notice(&self, stream: &RevocationStream, event: Event) -> Notice {
        Notice { cursor: self.streams.cursors.write(stream.subscription.position()), event }
    }

    /// The roles are those of now, which may be newer than the entry: an entry that is sent again never takes back what was
    /// sent since. An account of which nothing is known any more has no token from before that has not expired.
    fn event(&self, entry: &Entry) -> Option<Event> {
        let what = match entry.subject {
            Subject::Session(session) => Change::SessionEnded(session),
            Subject::Account(account) => Change::Roles(
                account,
                match self.revocations.standing(account)? {
                    Standing::Roles(roles) => Some(roles),
                    Standing::Unsure => Some(Vec::new()),
                    Standing::Refused => None,
                },
            ),
        };
        Some(Event::Revoked { what, revoke_time: entry.revoke_time, forget_time: entry.forget_time })
    }

    /// For how long an access token is still accepted, if it is not revoked.
    pub fn token_time_left(&self, access_token: &str) -> Result<Duration, AccessTokenError> {
        let now = self.env.now();
        let token = self.tokens.verify_access(access_token, now)?;
        Ok(Duration::try_from(token.accepted_until() - now).unwrap_or_default())
    }
}
