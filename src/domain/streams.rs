//! What the streams of revocations share beside the buffer: places, of which there is a bounded number, and cursors.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use aws_lc_rs::hmac;
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use tokio::sync::Semaphore;

use crate::error::{Error, FieldReason};

use super::{
    ids::UserId,
    master_key::{Derived, MasterKeys},
    service_identity::ServiceIdentity,
    watch::{Mark, Position},
};

/// How many streams read from the store at the same time.
const READERS: usize = 2;
/// How many streams there may be, and how many of them may be of one service.
const MOST_STREAMS: usize = 1_024;
const MOST_OF_ONE_SERVICE: usize = 256;

/// The first byte of a cursor.
const CURSOR_VERSION: u8 = 1;
const POSITION_BYTES: usize = 24;
const MAC_BYTES: usize = 16;

/// The service that a stream belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Subscriber {
    /// A service account, by its token.
    Account(UserId),
    /// A service without one, by its client certificate.
    Certificate(ServiceIdentity),
}

/// The places for streams. A clone is a handle to the same places.
#[derive(Debug, Clone, Default)]
pub struct Places(Arc<Mutex<Taken>>);

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by_service: HashMap<Subscriber, usize>,
}

/// A place that is taken. It is free again when this is dropped.
#[derive(Debug)]
pub struct Place {
    places: Places,
    service: Subscriber,
}

impl Places {
    /// Takes a place for a stream of a service, if there is one.
    pub fn take(&self, service: Subscriber) -> Option<Place> {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of_service = taken.by_service.get(&service).copied().unwrap_or(0);
        if taken.all >= MOST_STREAMS || of_service >= MOST_OF_ONE_SERVICE {
            return None;
        }
        taken.all += 1;
        taken.by_service.insert(service.clone(), of_service + 1);
        drop(taken);
        metrics::gauge!("postern_revocation_streams").increment(1.0);
        Some(Place { places: self.clone(), service })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.0.lock().unwrap_or_else(PoisonError::into_inner);
        taken.all -= 1;
        if let Some(of_service) = taken.by_service.get_mut(&self.service) {
            *of_service -= 1;
            if *of_service == 0 {
                taken.by_service.remove(&self.service);
            }
        }
        drop(taken);
        metrics::gauge!("postern_revocation_streams").decrement(1.0);
    }
}

/// What the streams of a replica share beside the buffer.
#[derive(Debug)]
pub struct Streams {
    pub places: Places,
    pub cursors: Cursors,
    /// Taken while a stream reads older entries from the store.
    pub readers: Semaphore,
}

impl Streams {
    pub fn new(masters: &MasterKeys) -> Result<Self, Error> {
        let cursors = Cursors::new(masters)?;
        Ok(Self { places: Places::default(), cursors, readers: Semaphore::new(READERS) })
    }
}

/// Writes positions as cursors, and reads them, with a key of their own.
pub struct Cursors(Derived<hmac::Key>);

impl std::fmt::Debug for Cursors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Cursors([redacted])")
    }
}

impl Cursors {
    pub fn new(masters: &MasterKeys) -> Result<Self, Error> {
        masters.derive("revocation-cursor", |key| Ok(hmac::Key::new(hmac::HMAC_SHA256, key))).map(Self)
    }

    /// The cursor for a position.
    pub fn write(&self, position: Position) -> String {
        let Position { complete, newest } = position;
        let mut bytes = vec![CURSOR_VERSION];
        bytes.extend(complete.to_be_bytes().into_iter().chain(newest.number.to_be_bytes()).chain(newest.digest));
        let mac = hmac::sign(self.0.active(), &bytes);
        bytes.extend(mac.as_ref().iter().take(MAC_BYTES));
        BASE64_URL_SAFE_NO_PAD.encode(bytes)
    }

    /// The position of a cursor; without one, the start of the log. A cursor of an unknown master key has the right form, and is
    /// one of another database.
    pub fn read(&self, cursor: &str) -> Result<Position, Error> {
        if cursor.is_empty() {
            return Ok(Position::default());
        }
        let malformed =
            || Error::field("resume_cursor", FieldReason::Malformed, "is not a cursor of a stream of revocations");
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(cursor).map_err(|_| malformed())?;
        let (signed, mac) = bytes.split_at_checked(1 + POSITION_BYTES).ok_or_else(malformed)?;
        let (version, numbers) = signed.split_first().ok_or_else(malformed)?;
        if *version != CURSOR_VERSION || mac.len() != MAC_BYTES {
            return Err(malformed());
        }
        let made_with = |key: &hmac::Key| {
            let expected = hmac::sign(key, signed);
            let expected = expected.as_ref().get(..MAC_BYTES).unwrap_or_default();
            aws_lc_rs::constant_time::verify_slices_are_equal(expected, mac).is_ok()
        };
        if !self.0.each().any(made_with) {
            return Err(Error::CursorExpired);
        }
        let (complete, newest) = numbers.split_first_chunk().ok_or_else(malformed)?;
        let (number, digest) = newest.split_first_chunk().ok_or_else(malformed)?;
        let digest = digest.try_into().map_err(|_| malformed())?;
        let newest = Mark { number: i64::from_be_bytes(*number), digest };
        Ok(Position { complete: i64::from_be_bytes(*complete), newest })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::master_key::MasterKey;

    fn cursors(byte: u8) -> Cursors {
        Cursors::new(&MasterKeys::from(MasterKey::from_bytes([byte; 32]))).expect("cursors")
    }

    fn position() -> Position {
        Position { complete: 1, newest: Mark { number: 1 << 40, digest: [7; 8] } }
    }

    #[test]
    fn a_cursor_is_read_as_it_was_written() {
        let cursor = cursors(1).write(position());
        assert_eq!(cursors(1).read(&cursor).expect("a cursor"), position());
        assert_eq!(cursor, cursors(1).write(position()));
        assert_eq!(cursors(1).read("").expect("the start"), Position::default());
    }

    #[test]
    fn a_cursor_of_another_master_key_or_that_was_changed_is_of_another_database() {
        let cursor = cursors(1).write(position());
        assert!(matches!(cursors(2).read(&cursor), Err(Error::CursorExpired)));
        for at in 2..cursor.len() {
            let mut changed = cursor.clone().into_bytes();
            changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(changed).expect("text");
            // The last character has bits that mean nothing, and must be 0.
            assert!(cursors(1).read(&changed).is_err(), "{at}");
        }
    }

    #[test]
    fn what_has_not_the_form_of_a_cursor_is_malformed() {
        let cursor = cursors(1).write(position());
        for text in
            ["x", "not base64!", &cursor[1..], &cursor[..cursor.len() - 1], &format!("{cursor}AAAA"), &"A".repeat(55)]
        {
            assert!(matches!(cursors(1).read(text), Err(Error::InvalidFields(_))), "{text}");
        }
    }

    #[test]
    fn places_are_bounded_for_each_service_and_for_all() {
        let places = Places::default();
        let service = |number| Subscriber::Account(UserId(uuid::Uuid::from_u128(number)));
        let mut taken: Vec<_> = (0..MOST_OF_ONE_SERVICE).map(|_| places.take(service(0)).expect("a place")).collect();
        assert!(places.take(service(0)).is_none());
        taken.extend(
            (MOST_OF_ONE_SERVICE..MOST_STREAMS).map(|number| places.take(service(number as u128)).expect("a place")),
        );
        assert!(places.take(service(5_000)).is_none());
        taken.pop();
        assert!(places.take(service(0)).is_none());
        drop(places.take(service(5_000)).expect("a place"));
        drop(taken);
        assert!(places.0.lock().expect("not poisoned").by_service.is_empty());
    }
}
