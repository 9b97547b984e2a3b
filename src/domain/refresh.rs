//! The rules for a presented refresh token: what refresh and logout make of it. A backend reads the session's row,
//! locks it, and asks here, so that every backend decides alike.

use std::time::Duration;

use time::OffsetDateTime;

use super::{
    audit::AuditContext,
    ports::{Logout, LogoutOutcome, Rotation},
    session::{RefreshHash, RevokeReason},
};

/// A session's row, locked, when one of its refresh tokens is presented.
#[derive(Debug)]
pub(crate) struct StoredSession {
    pub generation: i64,
    pub refresh_hash: RefreshHash,
    pub refresh_expire_time: OffsetDateTime,
    pub revoke_time: Option<OffsetDateTime>,
    pub user_disabled: bool,
    /// The newest generation of which an access token was seen, as far as it is written.
    pub seen_generation: i64,
    /// How long ago the last rotation was, by the database's clock. If that clock was set back, how far ahead it is.
    pub since_rotation: Duration,
}

/// What a presented refresh token is to its session.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum TokenState {
    /// The live token: rotate.
    Current,
    /// The token before it, whose holder may not have received the live one: return that again.
    Previous,
    /// A used token that its owner has no more reason to present: it was stolen, or its client lost count. End the session.
    Consumed,
    /// A token that was minted before the database was restored from a backup, which does not know it: go on from it.
    Newer,
    /// A token of a session that has ended.
    Dead,
}

impl StoredSession {
    pub(crate) fn classify(&self, rotation: &Rotation) -> TokenState {
        let is_newer = rotation.presented_generation > self.generation;
        // The row does not know when a newer token expires.
        let expire_time = if is_newer { rotation.presented_expire_time } else { self.refresh_expire_time };
        if self.revoke_time.is_some() || self.user_disabled || expire_time <= rotation.context.now {
            return TokenState::Dead;
        }
        if is_newer {
            return TokenState::Newer;
        }
        if rotation.presented_generation == self.generation {
            // Another token of the live generation: there are two lineages, and one of them is not ours.
            let same = rotation.presented_hash == self.refresh_hash;
            return if same { TokenState::Current } else { TokenState::Consumed };
        }
        let is_previous = rotation.presented_generation == self.generation - 1;
        if is_previous && self.may_be_presented_again(rotation) { TokenState::Previous } else { TokenState::Consumed }
    }

    /// Whether the token before the live one, which is unused, may yield the live one again.
    ///
    /// Shortly after the rotation always: two calls of the client may have raced. Later only while the answer to the rotation
    /// may have been lost. It was not if its access token came back, for then somebody holds the live token.
    fn may_be_presented_again(&self, rotation: &Rotation) -> bool {
        let within = |window: Duration| !window.is_zero() && self.since_rotation <= window;
        let is_seen = self.seen_generation.max(rotation.seen_generation) >= self.generation;
        within(rotation.retry_window) || !is_seen && within(rotation.lost_answer_window)
    }
}

/// A session's row, locked, when one of its refresh tokens is presented to log out.
#[derive(Debug)]
pub(crate) struct LogoutTarget {
    pub generation: i64,
    pub refresh_expire_time: OffsetDateTime,
    pub revoked: bool,
    /// Whether it was revoked by a logout everywhere that presented a token of this session.
    pub revoked_by_logout_everywhere: bool,
}

/// What a logout does. The session of the presented token ends in every case.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct LogoutDecision {
    /// Why the token's own session ends, if it has not ended before.
    pub reason: RevokeReason,
    /// Whether the user's other sessions end too.
    pub others_too: bool,
    pub outcome: LogoutOutcome,
}

impl LogoutDecision {
    /// The context for the audit row. A consumed token does not authenticate its user, so the row then has no actor.
    pub(crate) fn audit_context(&self, logout: &Logout) -> AuditContext {
        if self.reason == RevokeReason::TokenReused { logout.context } else { logout.context.by(logout.user_id) }
    }
}

impl LogoutTarget {
    pub(crate) fn decide(&self, logout: &Logout) -> LogoutDecision {
        let decision = |reason, others_too, outcome| LogoutDecision { reason, others_too, outcome };
        // The previous token counts like the live one: the client may never have received the successor. An older one was
        // stolen, or its client lost count, as at a refresh.
        let newest = logout.presented_generation >= self.generation - 1;
        if !logout.everywhere {
            let reason = if newest { RevokeReason::Logout } else { RevokeReason::TokenReused };
            return decision(reason, false, LogoutOutcome::LoggedOut);
        }
        if self.revoked_by_logout_everywhere {
            // The same request again; the answer to the first one was lost.
            decision(RevokeReason::LogoutEverywhere, false, LogoutOutcome::LoggedOut)
        } else if self.revoked || self.refresh_expire_time <= logout.context.now {
            decision(RevokeReason::Logout, false, LogoutOutcome::Refused)
        } else if newest {
            decision(RevokeReason::LogoutEverywhere, true, LogoutOutcome::LoggedOut)
        } else {
            decision(RevokeReason::TokenReused, false, LogoutOutcome::Refused)
        }
    }
}

#[cfg(test)]
mod tests {
    //! A model of an owner and a thief who share a session, and of two replicas. Every sequence of up to eight steps is tried
    //! against the rules in `refresh.rs`.
    //!
    //! The owner obeys the contract: it keeps a new refresh token before it uses the access token beside it, and it presents
    //! the newest refresh token that it has. Only its tabs may race, within the retry window. The thief does what it likes.

    use std::collections::HashSet;

    use uuid::Uuid;

    use super::*;
    use crate::domain::{
        ids::{AuditEventId, SessionId, UserId},
        session::RefreshGrant,
    };

    const STEPS: usize = 8;
    const RETRY_WINDOW: Duration = Duration::from_secs(10);
    const LOST_ANSWER_WINDOW: Duration = Duration::from_hours(24);
    const NOW: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;

    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    enum Who {
        Owner,
        Thief,
    }

    /// The replicas of the model.
    const REPLICAS: [usize; 2] = [0, 1];

    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    enum Step {
        /// Presents the newest refresh token, or the one before it, to a replica. The answer arrives or is lost.
        Refresh {
            who: Who,
            before_newest: bool,
            replica: usize,
            arrives: bool,
        },
        /// Presents the newest access token to a replica.
        Use {
            who: Who,
            replica: usize,
        },
        /// The thief copies what the owner has.
        Steal,
        /// A second passes, then eleven, then 25 hours. The replicas write what they have seen.
        Second,
        ElevenSeconds,
        MoreThanADay,
        /// A replica dies before it has written what it saw.
        Crash {
            replica: usize,
        },
    }

    /// What somebody holds.
    #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
    struct Holder {
        /// The generation of its newest tokens.
        newest: Option<i64>,
    }

    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    struct World {
        // What the service knows.
        generation: i64,
        has_ended: bool,
        since_rotation: Duration,
        written: i64,
        waiting: [i64; 2],
        // What the others have.
        owner: Holder,
        thief: Holder,
        // What the claims are about.
        /// An answer to the owner was lost, and it came back too late.
        owner_is_late: bool,
        /// To how many generations the thief has rotated the session since the owner was here, and was seen in each.
        thief_seen: u8,
        /// Whether the last rotation was the thief's and its access token has not come back yet.
        thief_rotated: bool,
    }

    /// The token of a generation. There is one, because the rules never give another.
    fn hash(generation: i64) -> RefreshHash {
        RefreshHash([generation.to_le_bytes()[0]; 32])
    }

    fn rotation(generation: i64, seen_generation: i64) -> Rotation {
        let id = Uuid::nil();
        Rotation {
            presented_generation: generation,
            presented_hash: hash(generation),
            presented_expire_time: NOW + Duration::from_hours(24 * 365),
            next: RefreshGrant {
                session_id: SessionId(id),
                user_id: UserId(id),
                generation: generation + 1,
                issue_time: NOW,
                expire_time: NOW,
                session_end_time: NOW,
            },
            next_hash: hash(generation + 1),
            context: AuditContext {
                event: AuditEventId(id),
                now: NOW,
                actor: None,
                client_ip: None,
                retain_until: NOW,
            },
            retry_window: RETRY_WINDOW,
            lost_answer_window: LOST_ANSWER_WINDOW,
            seen_generation,
        }
    }

    impl World {
        fn new() -> Self {
            Self {
                generation: 0,
                has_ended: false,
                since_rotation: Duration::ZERO,
                written: 0,
                waiting: [0; 2],
                owner: Holder { newest: Some(0) },
                thief: Holder::default(),
                owner_is_late: false,
                thief_seen: 0,
                thief_rotated: false,
            }
        }

        fn holder(&mut self, who: Who) -> &mut Holder {
            match who {
                Who::Owner => &mut self.owner,
                Who::Thief => &mut self.thief,
            }
        }

        fn classified(&self, generation: i64, replica: usize) -> TokenState {
            let session = StoredSession {
                generation: self.generation,
                refresh_hash: hash(self.generation),
                refresh_expire_time: NOW + Duration::from_hours(24 * 365),
                revoke_time: self.has_ended.then_some(NOW),
                user_disabled: false,
                seen_generation: self.written,
                since_rotation: self.since_rotation,
            };
            session.classify(&rotation(generation, self.waiting[replica]))
        }

        fn write(&mut self) {
            for replica in REPLICAS {
                self.written = self.written.max(std::mem::take(&mut self.waiting[replica]));
            }
        }

        /// The world after a step; `None` if the step is not possible. Checks the claims.
        fn after(mut self, step: Step) -> Option<Self> {
            match step {
                Step::Refresh { who, before_newest, replica, arrives } => {
                    let newest = self.holder(who).newest?;
                    let presented = if before_newest { newest - 1 } else { newest };
                    let races = self.since_rotation <= RETRY_WINDOW && newest == self.generation;
                    if presented < 0 || (who == Who::Owner && before_newest && !races) {
                        return None;
                    }
                    self.refresh(who, presented, replica, arrives);
                }
                Step::Use { who, replica } => {
                    let newest = self.holder(who).newest?;
                    self.waiting[replica] = self.waiting[replica].max(newest);
                    if who == Who::Thief && self.thief_rotated && newest == self.generation {
                        self.thief_rotated = false;
                        self.thief_seen += 1;
                    }
                }
                Step::Steal => self.thief = self.owner,
                Step::Second => self.write(),
                Step::ElevenSeconds => {
                    self.write();
                    self.since_rotation = self.since_rotation.max(Duration::from_secs(11));
                }
                Step::MoreThanADay => {
                    self.write();
                    self.since_rotation = self.since_rotation.max(Duration::from_hours(25));
                    self.owner_is_late |= self.owner.newest < Some(self.generation);
                }
                Step::Crash { replica } => self.waiting[replica] = 0,
            }
            Some(self)
        }

        fn refresh(&mut self, who: Who, presented: i64, replica: usize, arrives: bool) {
            let live: Vec<i64> = (0..=self.generation)
                .filter(|generation| self.classified(*generation, replica) == TokenState::Current)
                .collect();
            assert!(live.len() <= 1, "two live tokens: {live:?}");

            let state = self.classified(presented, replica);
            let is_seen = self.written.max(self.waiting[replica]) >= self.generation;
            let was_alive = !self.has_ended;
            match state {
                TokenState::Current => {
                    self.generation += 1;
                    self.since_rotation = Duration::ZERO;
                    self.thief_rotated = who == Who::Thief;
                }
                // Whoever is given a token is given the live one.
                TokenState::Previous => {}
                TokenState::Consumed => self.has_ended = true,
                TokenState::Dead => return,
                TokenState::Newer => panic!("nobody restored the database"),
            }
            if presented < self.generation - 1 && state != TokenState::Current {
                assert!(self.has_ended, "a token older than the previous one ends the session");
            }
            if state == TokenState::Previous && is_seen {
                assert!(
                    self.since_rotation <= RETRY_WINDOW,
                    "a token whose successor was seen yields it again only in a race"
                );
            }
            if self.thief.newest.is_none() && was_alive && !self.owner_is_late {
                assert!(!self.has_ended, "without a thief, no lost answer and no race ends the session");
            }
            if who == Who::Owner {
                assert!(
                    self.thief_seen < 2 || self.has_ended,
                    "a thief who was seen twice is noticed when the owner comes"
                );
                self.thief_seen = 0;
                self.thief_rotated = false;
            }
            if arrives && !self.has_ended {
                let live = self.generation;
                self.holder(who).newest = Some(live);
            }
        }
    }

    fn steps() -> Vec<Step> {
        let mut steps = vec![Step::Steal, Step::Second, Step::ElevenSeconds, Step::MoreThanADay];
        for replica in REPLICAS {
            steps.push(Step::Crash { replica });
            for who in [Who::Owner, Who::Thief] {
                steps.push(Step::Use { who, replica });
                for (before_newest, arrives) in [(false, false), (false, true), (true, false), (true, true)] {
                    steps.push(Step::Refresh { who, before_newest, replica, arrives });
                }
            }
        }
        steps
    }

    #[test]
    fn no_sequence_of_eight_steps_breaks_a_promise() {
        let steps = steps();
        let mut worlds = HashSet::from([World::new()]);
        let (mut endings, mut tried) = (0, 0_usize);
        for _ in 0..STEPS {
            let mut next = HashSet::new();
            for world in &worlds {
                for step in &steps {
                    if let Some(after) = world.after(*step) {
                        tried += 1;
                        endings += usize::from(after.has_ended && !world.has_ended);
                        next.insert(after);
                    }
                }
            }
            worlds = next;
        }
        println!("{tried} steps from different worlds tried, {} worlds in the end", worlds.len());
        assert!(tried > 10_000 && endings > 100, "{tried} steps, {endings} of which end the session");
    }

    /// Both refresh in turn, and each uses its access token once.
    #[test]
    fn a_thief_and_an_owner_in_turn_are_noticed_within_one_generation() {
        for (first, second) in [(Who::Owner, Who::Thief), (Who::Thief, Who::Owner)] {
            for [here, there] in [[0, 0], [0, 1]] {
                let turn = |who, replica| {
                    let refresh = Step::Refresh { who, before_newest: false, replica, arrives: true };
                    [refresh, Step::Use { who, replica }, Step::ElevenSeconds]
                };
                let steps = [&[Step::Steal][..], &turn(first, here), &turn(second, there)].concat();
                let world = steps.iter().fold(World::new(), |world, step| world.after(*step).expect("a possible step"));
                assert!(world.has_ended, "{first:?} first");
            }
        }
    }
}
