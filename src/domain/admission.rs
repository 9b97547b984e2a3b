//! Who may have a password hashed next. A caller takes a place before anything is spent on its call, in memory and in
//! microseconds, so that refusing costs next to nothing.
//!
//! There are as many places as hashes may run and wait. While all are taken, callers wait for one for a short time, and
//! places go to client addresses in turn. No client has more than its share of the places, or of those who wait, and no
//! account has more than its share of the places: whoever floods the service stands in the way of nobody else.

use std::{
    collections::{HashMap, VecDeque},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use crate::error::Error;

use super::{
    env::Deadline,
    throttle::{AttemptSubject, network},
};

/// How long a caller waits for a place before it is refused, on average. A wait costs nothing; a refusal costs an
/// answer, and a client that comes back at once.
const PATIENCE: Duration = Duration::from_secs(1);
/// The waits differ, from half of [`PATIENCE`] to one and a half times as long, in so many steps. Callers that come at
/// the same moment are then not refused at the same moment, which would make every other call wait.
const STEPS: u32 = 256;
/// The most callers that wait for a place: three quarters of the calls that a process serves at the same time
/// (`grpc::limits`), so that the other calls find room beside them.
const MOST_WAITING: usize = 1_536;

/// So many callers of one client may wait until their deadline, for places that only their own account keeps from them.
const FEW_WAITING: usize = 64;
/// The shortest time after which a refused caller is asked to come back.
const SHORTEST_RETRY: Duration = Duration::from_millis(100);

/// For whom a place is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Applicant {
    /// The client's address, if it is known.
    pub client: Option<IpAddr>,
    /// The account whose password is tried, if it is a known one.
    pub account: Option<AttemptSubject>,
}

/// The places, and who waits for one.
#[derive(Debug)]
pub struct Admission {
    state: Mutex<State>,
    limits: Limits,
}

/// What is bounded.
#[derive(Debug, Clone, Copy)]
struct Limits {
    places: usize,
    /// The most places of one client, so that others find one.
    places_per_client: usize,
    /// The most places of one account.
    places_per_account: usize,
    /// The most waiting callers of one client.
    waiting_per_client: usize,
}

#[derive(Debug, Default)]
struct State {
    taken: usize,
    waiting: usize,
    next_ticket: u64,
    clients: HashMap<Option<IpAddr>, Client>,
    /// How many places each account has.
    accounts: HashMap<AttemptSubject, usize>,
    /// The clients that have somebody waiting, in the order in which they get a place.
    turns: VecDeque<Option<IpAddr>>,
}

#[derive(Debug, Default)]
struct Client {
    taken: usize,
    waiting: VecDeque<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    ticket: u64,
    applicant: Applicant,
    grant: oneshot::Sender<Place>,
}

/// A place. It is free again when this is dropped.
#[derive(Debug)]
pub struct Place {
    admission: Arc<Admission>,
    applicant: Applicant,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.admission.free(self.applicant);
    }
}

/// Takes a caller off the list when its wait ends, in whatever way.
struct Wait<'a> {
    admission: &'a Admission,
    client: Option<IpAddr>,
    ticket: u64,
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        self.admission.lock().leave(self.client, self.ticket);
    }
}

impl Admission {
    /// `places` is how many hashes may run or wait. `account_attempts` is how many attempts one account may have under
    /// way.
    pub fn new(places: usize, account_attempts: usize) -> Arc<Self> {
        let share = |of: usize, part: usize, whole: usize| (of * part).div_ceil(whole).max(1);
        let limits = Limits {
            places,
            places_per_client: share(places, 3, 4),
            places_per_account: share(places, 1, 4).min(account_attempts.max(1)),
            waiting_per_client: share(MOST_WAITING, 3, 4),
        };
        Arc::new(Self { state: Mutex::default(), limits })
    }

    /// Takes a place, or waits for one until the deadline allows no more waiting. `hash_time` is how long the pool
    /// needs for one hash on all its threads together.
    pub async fn take(
        self: &Arc<Self>,
        applicant: Applicant,
        deadline: Deadline,
        hash_time: Duration,
    ) -> Result<Place, Error> {
        let applicant = Applicant { client: applicant.client.map(network), ..applicant };
        let (grant, granted) = oneshot::channel();
        let (ticket, until) = {
            let mut state = self.lock();
            // A place is of use only if the hashes that come first are done by the deadline.
            let hashes = u32::try_from(state.taken).unwrap_or(u32::MAX);
            let latest = deadline.0.checked_sub(hash_time.saturating_mul(hashes));
            let now = Instant::now();
            if deadline.0 <= now {
                return Err(Error::DeadlineExceeded);
            }
            let Some(latest) = latest.filter(|latest| *latest >= now) else {
                return Err(state.overloaded(hash_time));
            };
            // Whoever waits cannot take this place, or would have been given it.
            if state.may_take(&applicant, self.limits) {
                state.take(&applicant);
                return Ok(Place { admission: Arc::clone(self), applicant });
            }
            if state.waiting >= MOST_WAITING || state.waiting_of(applicant.client) >= self.limits.waiting_per_client {
                return Err(state.overloaded(hash_time));
            }
            // Behind a few others of its own account it waits as long as it can: each of them is done soon.
            let patient =
                !state.is_crowded(&applicant, self.limits) && state.waiting_of(applicant.client) < FEW_WAITING;
            let ticket = state.join(applicant, grant);
            (ticket, if patient { latest } else { latest.min(now + patience(ticket)) })
        };
        let wait = Wait { admission: self, client: applicant.client, ticket };
        if let Ok(Ok(place)) = tokio::time::timeout_at(until.into(), granted).await {
            return Ok(place);
        }
        drop(wait);
        Err(self.lock().overloaded(hash_time))
    }

    /// How many callers wait for a place.
    pub fn waiting(&self) -> usize {
        self.lock().waiting
    }

    fn free(self: &Arc<Self>, applicant: Applicant) {
        // A grant that nobody takes any more is dropped after the lock, because it frees its place again.
        let unclaimed = {
            let mut state = self.lock();
            state.free(&applicant);
            state.grant(self)
        };
        drop(unclaimed);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long the caller with this ticket waits. Neighbouring tickets are far apart.
fn patience(ticket: u64) -> Duration {
    // 157 and 256 have no common factor, so 256 tickets in a row get 256 different steps.
    let step = u32::try_from(ticket.wrapping_mul(157) % u64::from(STEPS)).unwrap_or(0);
    PATIENCE / 2 + PATIENCE * step / STEPS
}

impl State {
    fn may_take(&self, applicant: &Applicant, limits: Limits) -> bool {
        let of_account = applicant.account.and_then(|account| self.accounts.get(&account)).copied().unwrap_or(0);
        !self.is_crowded(applicant, limits) && of_account < limits.places_per_account
    }

    /// Whether there is no place for any account of this client.
    fn is_crowded(&self, applicant: &Applicant, limits: Limits) -> bool {
        let of_client = self.clients.get(&applicant.client).map_or(0, |client| client.taken);
        self.taken >= limits.places || of_client >= limits.places_per_client
    }

    fn take(&mut self, applicant: &Applicant) {
        self.taken += 1;
        self.clients.entry(applicant.client).or_default().taken += 1;
        if let Some(account) = applicant.account {
            *self.accounts.entry(account).or_default() += 1;
        }
    }

    fn free(&mut self, applicant: &Applicant) {
        self.taken = self.taken.saturating_sub(1);
        if let Some(client) = self.clients.get_mut(&applicant.client) {
            client.taken = client.taken.saturating_sub(1);
        }
        self.forget_idle(applicant.client);
        if let Some(account) = applicant.account
            && let Some(taken) = self.accounts.get_mut(&account)
        {
            *taken = taken.saturating_sub(1);
            if *taken == 0 {
                self.accounts.remove(&account);
            }
        }
    }

    fn waiting_of(&self, client: Option<IpAddr>) -> usize {
        self.clients.get(&client).map_or(0, |client| client.waiting.len())
    }

    fn join(&mut self, applicant: Applicant, grant: oneshot::Sender<Place>) -> u64 {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.waiting += 1;
        let client = self.clients.entry(applicant.client).or_default();
        if client.waiting.is_empty() {
            self.turns.push_back(applicant.client);
        }
        client.waiting.push_back(Waiting { ticket, applicant, grant });
        ticket
    }

    fn leave(&mut self, client: Option<IpAddr>, ticket: u64) {
        let Some(entry) = self.clients.get_mut(&client) else {
            return;
        };
        let Ok(index) = entry.waiting.binary_search_by_key(&ticket, |waiting| waiting.ticket) else {
            return;
        };
        entry.waiting.remove(index);
        self.waiting -= 1;
        if entry.waiting.is_empty() {
            self.turns.retain(|turn| *turn != client);
        }
        self.forget_idle(client);
    }

    /// Gives free places to those whose turn it is. Returns the grants that nobody takes any more.
    fn grant(&mut self, admission: &Arc<Admission>) -> Vec<Place> {
        let mut unclaimed = Vec::new();
        let mut passed_over = 0;
        while passed_over < self.turns.len() {
            let Some(turn) = self.turns.pop_front() else {
                break;
            };
            let next = self.clients.get(&turn).and_then(|client| {
                client.waiting.iter().position(|waiting| self.may_take(&waiting.applicant, admission.limits))
            });
            let granted = next.and_then(|index| self.clients.get_mut(&turn)?.waiting.remove(index));
            if self.waiting_of(turn) > 0 {
                self.turns.push_back(turn);
            }
            match granted {
                None => passed_over += 1,
                Some(waiting) => {
                    passed_over = 0;
                    self.waiting -= 1;
                    self.take(&waiting.applicant);
                    let place = Place { admission: Arc::clone(admission), applicant: waiting.applicant };
                    unclaimed.extend(waiting.grant.send(place).err());
                }
            }
        }
        unclaimed
    }

    fn forget_idle(&mut self, client: Option<IpAddr>) {
        if self.clients.get(&client).is_some_and(|client| client.taken == 0 && client.waiting.is_empty()) {
            self.clients.remove(&client);
        }
    }

    /// The refusal. Those who wait and have a place come first, at the speed of the pool.
    fn overloaded(&self, hash_time: Duration) -> Error {
        let ahead = u32::try_from(self.waiting).unwrap_or(u32::MAX).saturating_add(1);
        Error::Overloaded { retry_after: hash_time.saturating_mul(ahead).max(SHORTEST_RETRY) }
    }
}

#[cfg(test)]
mod tests {
    use std::task::Poll;

    use futures_util::{future::join_all, poll};

    use super::*;

    const FAST: Duration = Duration::from_micros(1);

    fn from(client: u8) -> Applicant {
        Applicant { client: Some(IpAddr::from([192, 0, 2, client])), account: None }
    }

    fn to(client: u8, account: u8) -> Applicant {
        Applicant { account: Some(AttemptSubject([account; 32])), ..from(client) }
    }

    fn soon() -> Deadline {
        Deadline(Instant::now() + Duration::from_secs(5))
    }

    async fn place(admission: &Arc<Admission>, applicant: Applicant) -> Place {
        let mut taking = Box::pin(admission.take(applicant, soon(), FAST));
        match poll!(&mut taking) {
            Poll::Ready(place) => place.expect("a place"),
            Poll::Pending => panic!("there is no place for {applicant:?}"),
        }
    }

    fn is_idle(admission: &Admission) -> bool {
        let state = admission.lock();
        state.taken == 0
            && state.waiting == 0
            && state.clients.is_empty()
            && state.accounts.is_empty()
            && state.turns.is_empty()
    }

    #[tokio::test]
    async fn no_client_takes_all_places_and_none_waits_behind_it() {
        let admission = Admission::new(8, 100);
        let mut greedy = Vec::new();
        for _ in 0..6 {
            greedy.push(place(&admission, from(1)).await);
        }
        let mut one_more = Box::pin(admission.take(from(1), soon(), FAST));
        assert!(poll!(&mut one_more).is_pending(), "three quarters are its share");
        let others = [place(&admission, from(2)).await, place(&admission, from(3)).await];
        drop(greedy.pop());
        assert!(poll!(&mut one_more).is_ready());
        drop((greedy, others, one_more));
        assert!(is_idle(&admission));
    }

    #[tokio::test]
    async fn an_account_has_a_share_whoever_asks_for_it() {
        let admission = Admission::new(16, 3);
        let mut places = Vec::new();
        for client in 1..=3 {
            places.push(place(&admission, to(client, 1)).await);
        }
        let mut fourth = Box::pin(admission.take(to(4, 1), soon(), FAST));
        assert!(poll!(&mut fourth).is_pending());
        let other = place(&admission, to(4, 2)).await;
        drop(places.pop());
        assert!(poll!(&mut fourth).is_ready());
        drop((places, other, fourth));
        assert!(is_idle(&admission));
    }

    #[tokio::test]
    async fn places_go_to_the_clients_in_turn() {
        let admission = Admission::new(1, 100);
        let held = place(&admission, from(9)).await;
        let mut waiting: Vec<_> =
            [1, 1, 1, 2, 3].map(|client| Box::pin(admission.take(from(client), soon(), FAST))).into();
        for taking in &mut waiting {
            assert!(poll!(taking).is_pending());
        }
        let mut order = Vec::new();
        drop(held);
        while order.len() < 5 {
            for (index, taking) in waiting.iter_mut().enumerate() {
                if !order.contains(&index)
                    && let Poll::Ready(place) = poll!(taking)
                {
                    order.push(index);
                    drop(place);
                    break;
                }
            }
        }
        assert_eq!(order, [0, 3, 4, 1, 2], "the others do not wait behind the many of the first");
        assert!(is_idle(&admission));
    }

    #[tokio::test]
    async fn whoever_gives_up_leaves_nothing_behind() {
        let admission = Admission::new(1, 100);
        let held = place(&admission, from(1)).await;
        let mut gone: Vec<_> = (0..20).map(|client| Box::pin(admission.take(from(client), soon(), FAST))).collect();
        for taking in &mut gone {
            assert!(poll!(taking).is_pending());
        }
        // One of them is granted the place and goes before it takes it.
        drop(held);
        drop(gone);
        assert!(is_idle(&admission));
        drop(place(&admission, from(2)).await);
    }

    #[tokio::test]
    async fn a_place_that_could_not_be_used_by_the_deadline_is_not_given() {
        let admission = Admission::new(4, 100);
        let hash_time = Duration::from_secs(2);
        let take = |client| admission.take(from(client), soon(), hash_time);
        let (first, second, third) = (take(1).await, take(2).await, take(3).await);
        assert!(first.is_ok() && second.is_ok() && third.is_ok(), "two hashes take four of five seconds");
        let refused = take(4).await.map(drop);
        assert!(matches!(refused, Err(Error::Overloaded { retry_after }) if retry_after == hash_time), "{refused:?}");
        drop((first, second, third));
        assert!(is_idle(&admission));
    }

    #[test]
    fn callers_that_come_at_once_are_refused_one_after_the_other() {
        let waits: std::collections::BTreeSet<_> = (1_000..1_256).map(patience).collect();
        assert_eq!(waits.len(), 256);
        assert_eq!(waits.first(), Some(&(PATIENCE / 2)));
        assert!(waits.last().is_some_and(|longest| *longest < PATIENCE * 3 / 2));
    }

    #[tokio::test]
    async fn a_crowd_is_refused_after_a_while_and_is_told_when_there_is_room() {
        let admission = Admission::new(4, 100);
        let held: Vec<_> = join_all((0..4).map(|client| place(&admission, from(client)))).await;
        let crowd =
            join_all((0..100).map(|client| admission.take(from(client), soon(), Duration::from_millis(1)))).await;
        assert!(crowd.iter().all(|refused| matches!(refused, Err(Error::Overloaded { .. }))));
        drop(held);
        assert!(is_idle(&admission));
    }
}
