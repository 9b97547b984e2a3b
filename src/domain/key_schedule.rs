//! When a signing key is made, signs, and is forgotten. Nothing here reads a clock or a store: from the stored keys and the
//! time, every replica comes to the same answer.
//!
//! A key is `next` (published, does not sign), then `signing`, then `retired` (published until the last token that it signed
//! is dead), then forgotten. Its time to sign is stored when it is known to be visible to every replica that reads, so a
//! replica that knows the keys changes over at that time by itself.

use std::{cmp::Reverse, time::Duration};

use time::OffsetDateTime;

use super::ports::SealedSigningKey;

/// How far the clocks of two replicas may differ without anybody noticing.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(2);
/// The longest time between two readings of the keys.
const LONGEST_REREAD: Duration = Duration::from_secs(20);
/// The longest `max-age` of the published keys.
const LONGEST_MAX_AGE: Duration = Duration::from_mins(5);
/// How many readings of the keys may fail before a replica stops to sign.
const FAILED_READS: u32 = 10;
/// No more keys are made than this: a lifetime of tokens that is far longer than the rotation would need more.
const MOST_KEYS: usize = 16;

/// The settings of the schedule, with the lifetime of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeySchedule {
    /// How long a key signs.
    pub rotation: Duration,
    /// How long a key is published before it signs. Whole seconds.
    pub publish_ahead: Duration,
    /// The longest time between signing a token and the last moment that any replica accepts it.
    pub token_lifetime: Duration,
}

/// The state of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyState {
    Next,
    Signing,
    Retired,
}

impl KeyState {
    /// The state as the command line prints it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Next => "next",
            Self::Signing => "signing",
            Self::Retired => "retired",
        }
    }
}

/// What is to be done about the keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyStep {
    /// A next key is made. When it signs is decided once it is visible.
    Add,
    Schedule {
        kid: String,
        sign_time: OffsetDateTime,
    },
    Forget {
        kid: String,
    },
}

impl KeySchedule {
    /// The shortest time that a key may be published before it signs.
    pub const SHORTEST_PUBLISH_AHEAD: Duration = Duration::from_secs(5);

    /// How often a replica reads the keys. Replicas may have different settings for a while: the shortest time counts.
    pub fn reread(&self, keys: &[SealedSigningKey]) -> Duration {
        reread(self.shortest_ahead(keys))
    }

    /// How long a verifier may keep the published keys, if they were read that long ago. A key is visible to every replica
    /// `reread` after it was stored, so a verifier that keeps them for so long has it `reread` + `max_age` after that. That
    /// is before it signs, by whatever clock: a quarter, a quarter, and the tolerance are no more than the whole.
    pub fn max_age(&self, keys: &[SealedSigningKey], read_ago: Duration) -> Duration {
        let ahead = self.shortest_ahead(keys);
        // If they could not be read for long, the rest of the time is less.
        let rest = ahead.saturating_sub(CLOCK_TOLERANCE).saturating_sub(read_ago.max(self.reread(keys)));
        Duration::from_secs((ahead / 4).min(LONGEST_MAX_AGE).min(rest).as_secs())
    }

    /// How long a replica may sign without having read the keys. Another key may sign by then, so the one before it is
    /// published for that much longer.
    pub fn longest_staleness(&self, keys: &[SealedSigningKey]) -> Duration {
        self.reread(keys) * FAILED_READS
    }

    fn shortest_ahead(&self, keys: &[SealedSigningKey]) -> Duration {
        keys.iter().filter_map(|key| key.publish_ahead).fold(self.publish_ahead, Duration::min)
    }

    /// How long before it signs the next key is published. Replicas may have different settings for a while: the longest
    /// time counts.
    pub fn ahead(&self, keys: &[SealedSigningKey]) -> Duration {
        keys.iter().filter_map(|key| key.publish_ahead).fold(self.publish_ahead, Duration::max)
    }

    /// What is due at this time. There is at least one key.
    pub fn due(&self, keys: &[SealedSigningKey], now: OffsetDateTime) -> Option<KeyStep> {
        let ahead = self.ahead(keys);
        let signing = signing(keys, now)?;
        for key in keys {
            // A time that is further away was written by a clock that was ahead.
            let is_credible = signs_since(key).is_some_and(|since| since <= now + ahead + CLOCK_TOLERANCE);
            if !is_credible {
                let sign_time = if key.kid == signing.kid { now } else { now + ahead };
                return Some(KeyStep::Schedule { kid: key.kid.clone(), sign_time });
            }
        }
        let has_next = keys.iter().any(|key| state(keys, key, now) == KeyState::Next);
        let since = signs_since(signing).unwrap_or(now);
        if !has_next && now >= since + self.rotation.saturating_sub(ahead) && keys.len() < MOST_KEYS {
            return Some(KeyStep::Add);
        }
        // A replica with other settings may have signed with it for longer than this one would have.
        let kept = self.token_lifetime + reread(ahead) * FAILED_READS;
        let over = keys.iter().find(|key| retired_since(keys, key, now).is_some_and(|since| now >= since + kept));
        over.map(|key| KeyStep::Forget { kid: key.kid.clone() })
    }

    /// What brings the next key forward as far as the verifiers allow. `None`: that was done.
    pub fn bring_forward(&self, keys: &[SealedSigningKey], now: OffsetDateTime) -> Option<KeyStep> {
        match self.due(keys, now) {
            Some(KeyStep::Schedule { kid, sign_time }) => Some(KeyStep::Schedule { kid, sign_time }),
            Some(KeyStep::Add | KeyStep::Forget { .. }) | None => {
                let has_next = keys.iter().any(|key| state(keys, key, now) == KeyState::Next);
                (!has_next).then_some(KeyStep::Add)
            }
        }
    }
}

/// How often the keys are read that are published for so long.
fn reread(ahead: Duration) -> Duration {
    (ahead / 4).min(LONGEST_REREAD)
}

/// From when a key signs, if that was decided.
pub fn signs_since(key: &SealedSigningKey) -> Option<OffsetDateTime> {
    match (key.sign_time, key.publish_ahead) {
        (Some(time), _) => Some(time),
        // Made by a release without rotation.
        (None, None) => Some(key.create_time),
        (None, Some(_)) => None,
    }
}

/// The key that signs at this time: the last one whose time has come. If there is none, because a clock was ahead, the one
/// whose time comes first.
pub fn signing(keys: &[SealedSigningKey], now: OffsetDateTime) -> Option<&SealedSigningKey> {
    let scheduled = || keys.iter().filter_map(|key| signs_since(key).map(|since| (since, key.kid.as_str(), key)));
    let last = scheduled().filter(|(since, ..)| *since <= now).max_by_key(|(since, kid, _)| (*since, Reverse(*kid)));
    let found = last.or_else(|| scheduled().min_by_key(|(since, kid, _)| (*since, *kid)));
    found.map(|(_, _, key)| key).or_else(|| keys.iter().min_by_key(|key| (key.create_time, key.kid.as_str())))
}

/// The state of one of these keys.
pub fn state(keys: &[SealedSigningKey], key: &SealedSigningKey, now: OffsetDateTime) -> KeyState {
    if signing(keys, now).is_some_and(|signing| signing.kid == key.kid) {
        return KeyState::Signing;
    }
    match signs_since(key) {
        Some(since) if since <= now => KeyState::Retired,
        Some(_) | None => KeyState::Next,
    }
}

/// Since when a key no longer signs.
fn retired_since(keys: &[SealedSigningKey], key: &SealedSigningKey, now: OffsetDateTime) -> Option<OffsetDateTime> {
    if state(keys, key, now) != KeyState::Retired {
        return None;
    }
    let since = signs_since(key)?;
    let later = keys.iter().filter(|other| other.kid != key.kid).filter_map(signs_since);
    later.filter(|other| *other >= since && *other <= now).min()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use time::{ext::NumericalDuration as _, macros::datetime};

    use super::*;

    const START: OffsetDateTime = datetime!(2030-01-02 03:04:05 UTC);

    fn schedule(rotation: u64, ahead: u64, lifetime: u64) -> KeySchedule {
        let seconds = Duration::from_secs;
        KeySchedule { rotation: seconds(rotation), publish_ahead: seconds(ahead), token_lifetime: seconds(lifetime) }
    }

    fn key(kid: &str, sign_time: Option<OffsetDateTime>, ahead: Option<u64>) -> SealedSigningKey {
        SealedSigningKey {
            kid: kid.to_owned(),
            algorithm: "ES256".to_owned(),
            sealed_private_key: Vec::new(),
            create_time: START,
            sign_time,
            publish_ahead: ahead.map(Duration::from_secs),
        }
    }

    /// A replica: how far its clock is off, in seconds; what it read last, and when by the true time.
    struct Replica {
        offset: i64,
        known: Vec<SealedSigningKey>,
        read_at: OffsetDateTime,
        down_until: OffsetDateTime,
        /// Until when it cannot read the keys, although it serves.
        cut_until: OffsetDateTime,
    }

    /// A service that verifies tokens: the keys that it fetched, and until when it keeps them.
    struct Verifier {
        keys: BTreeSet<String>,
        until: OffsetDateTime,
    }

    fn kids(keys: &[SealedSigningKey]) -> BTreeSet<String> {
        keys.iter().map(|key| key.kid.clone()).collect()
    }

    /// What a step does to the stored keys. `number` names a new key.
    fn take(stored: &mut Vec<SealedSigningKey>, step: KeyStep, now: OffsetDateTime, ahead: Duration, number: u32) {
        match step {
            KeyStep::Add => {
                let added = key(&format!("key {number}"), None, Some(ahead.as_secs()));
                stored.push(SealedSigningKey { create_time: now, ..added });
            }
            KeyStep::Schedule { kid, sign_time } => {
                stored.iter_mut().filter(|key| key.kid == kid).for_each(|key| key.sign_time = Some(sign_time));
            }
            KeyStep::Forget { kid } => stored.retain(|key| key.kid != kid),
        }
    }

    /// What went wrong and what was done in a simulated deployment.
    #[derive(Debug, Default)]
    struct Outcome {
        refused: Vec<String>,
        signed_with: BTreeSet<String>,
        most_next: usize,
        most_keys: usize,
    }

    /// What can happen in one second of a deployment.
    #[derive(Debug, Clone)]
    struct Second {
        /// A replica that is down from now on, and for how long.
        down: Option<(usize, i64)>,
        /// The same of one that cannot read the keys.
        cut: Option<(usize, i64)>,
        /// The replica that each verifier would ask, and the one that signs.
        asked: usize,
        signs: usize,
        /// Whether the step of this second is tried by two replicas with what they know.
        raced: bool,
    }

    /// Runs replicas and verifiers, second by second. Everything that a replica signs is shown to every verifier for as long
    /// as the token lives. `publishes_ahead` is false for a schedule that is broken on purpose.
    fn run(policies: &[KeySchedule], offsets: &[i64], seconds: &[Second], publishes_ahead: bool) -> Outcome {
        let first = key("key 0", Some(START), Some(policies[0].publish_ahead.as_secs()));
        let mut stored = vec![first];
        let (mut now, mut number, mut outcome) = (START, 0, Outcome::default());
        let new = |offset: &i64| Replica {
            offset: *offset,
            known: stored.clone(),
            read_at: START,
            down_until: START,
            cut_until: START,
        };
        let mut replicas: Vec<_> = offsets.iter().map(new).collect();
        let mut verifiers: Vec<_> = (0..3).map(|_| Verifier { keys: BTreeSet::new(), until: START }).collect();
        let mut alive: Vec<(String, OffsetDateTime)> = Vec::new();
        for second in seconds {
            now += 1.seconds();
            if let Some((index, length)) = second.down {
                let index = index % replicas.len();
                replicas[index].down_until = now + length.seconds();
            }
            if let Some((index, length)) = second.cut {
                let index = index % replicas.len();
                replicas[index].cut_until = now + length.seconds();
            }
            for (index, replica) in replicas.iter_mut().enumerate() {
                let policy = policies[index % policies.len()];
                let (is_up, own) = (replica.down_until.max(replica.cut_until) <= now, now + replica.offset.seconds());
                let is_due = now >= replica.read_at + policy.reread(&replica.known);
                if !is_up || !is_due {
                    continue;
                }
                // With a race, the step is decided from what another replica has changed meanwhile, and so is refused.
                let seen = if second.raced { replica.known.clone() } else { stored.clone() };
                if let Some(step) = policy.due(&seen, own)
                    && seen == stored
                {
                    number += 1;
                    let adds = step == KeyStep::Add;
                    let step = match step {
                        KeyStep::Schedule { kid, .. } if !publishes_ahead => KeyStep::Schedule { kid, sign_time: own },
                        step => step,
                    };
                    take(&mut stored, step, own, policy.publish_ahead, number);
                    // By the clock of the replica that makes one: by another one the last key may not sign yet.
                    let next = stored.iter().filter(|key| state(&stored, key, own) == KeyState::Next).count();
                    outcome.most_next = outcome.most_next.max(if adds { next } else { 0 });
                }
                replica.known.clone_from(&stored);
                replica.read_at = now;
            }
            let up: Vec<_> = (0..replicas.len()).filter(|index| replicas[*index].down_until <= now).collect();
            let fresh: Vec<_> = up.iter().copied().filter(|index| replicas[*index].cut_until <= now).collect();
            let Some(asked) = fresh.get(second.asked % fresh.len().max(1)).map(|index| (*index, &replicas[*index]))
            else {
                continue;
            };
            for verifier in verifiers.iter_mut().filter(|verifier| verifier.until <= now) {
                let policy = policies[asked.0 % policies.len()];
                verifier.keys = kids(&asked.1.known);
                verifier.until = now + policy.max_age(&asked.1.known, (now - asked.1.read_at).unsigned_abs());
            }
            let index = up[second.signs % up.len()];
            let (signer, policy) = (&replicas[index], policies[index % policies.len()]);
            if now - signer.read_at <= policy.longest_staleness(&signer.known) {
                let own = now + signer.offset.seconds();
                let kid = signing(&signer.known, own).expect("a key").kid.clone();
                outcome.signed_with.insert(kid.clone());
                alive.push((kid, now + policy.token_lifetime));
            }
            alive.retain(|(_, until)| *until > now);
            let shown: BTreeSet<_> = alive.iter().map(|(kid, _)| kid.clone()).collect();
            for kid in shown {
                let known_to_all = verifiers.iter().all(|verifier| verifier.keys.contains(&kid))
                    && fresh.iter().all(|index| kids(&replicas[*index].known).contains(&kid));
                if !known_to_all {
                    outcome.refused.push(format!("{kid} at {}", now - START));
                }
            }
            outcome.most_keys = outcome.most_keys.max(stored.len());
        }
        outcome
    }

    fn any_second() -> impl Strategy<Value = Second> {
        // A replica is down for up to ten minutes: with these settings that is many rotations.
        let down = prop::option::weighted(0.01, (any::<usize>(), 1_i64..600));
        let cut = prop::option::weighted(0.01, (any::<usize>(), 1_i64..600));
        (down, cut, any::<usize>(), any::<usize>(), any::<bool>()).prop_map(|(down, cut, asked, signs, raced)| Second {
            down,
            cut,
            asked,
            signs,
            raced,
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

        #[test]
        fn no_verifier_that_obeys_max_age_ever_meets_a_key_that_it_does_not_know(
            ahead in 5_u64..40,
            longer in 0_u64..60,
            lifetime in 1_u64..90,
            offsets in prop::collection::vec(-1_i64..=1, 1..4),
            seconds in prop::collection::vec(any_second(), 600),
        ) {
            let outcome = run(&[schedule(ahead + longer, ahead, lifetime)], &offsets, &seconds, true);
            prop_assert!(outcome.refused.is_empty(), "{:?}", outcome.refused);
            prop_assert!(outcome.most_next <= 1 && outcome.most_keys <= MOST_KEYS, "{outcome:?}");
        }

        #[test]
        fn replicas_may_have_different_settings_while_these_are_changed(
            ahead in 5_u64..40,
            factor in 1_u64..4,
            offsets in prop::collection::vec(-1_i64..=1, 2..4),
            seconds in prop::collection::vec(any_second(), 600),
        ) {
            // The first key tells of the longer time.
            let policies = [schedule(200, ahead * factor, 30), schedule(200, ahead, 30)];
            let outcome = run(&policies, &offsets, &seconds, true);
            prop_assert!(outcome.refused.is_empty(), "{:?}", outcome.refused);
        }
    }

    fn quiet(length: usize) -> Vec<Second> {
        (0..length)
            .map(|second| Second { down: None, cut: None, asked: second, signs: second / 2, raced: false })
            .collect()
    }

    #[test]
    fn without_publishing_ahead_verifiers_refuse() {
        let policy = [schedule(40, 20, 30)];
        let outcome = run(&policy, &[0, 0], &quiet(300), true);
        assert_eq!((outcome.refused.as_slice(), outcome.signed_with.len() >= 5), ([].as_slice(), true), "{outcome:?}");
        assert_ne!(run(&policy, &[0, 0], &quiet(300), false).refused, Vec::<String>::new());
    }

    #[test]
    fn a_replica_whose_clock_is_ahead_makes_one_next_key_at_a_time() {
        // The next key is made as soon as the last one signs.
        let outcome = run(&[schedule(16, 16, 1)], &[1], &quiet(600), true);
        assert_eq!((outcome.refused.as_slice(), outcome.most_next), ([].as_slice(), 1), "{outcome:?}");
    }

    #[test]
    fn a_key_is_kept_for_a_replica_that_may_sign_without_reading_for_longer_than_the_others() {
        let mut seconds = quiet(600);
        // The first replica does not hear of the next key, and signs alone with the last one.
        seconds[154].cut = Some((0, 130));
        for second in &mut seconds {
            second.signs = 0;
        }
        let outcome = run(&[schedule(200, 45, 30), schedule(200, 15, 30)], &[0, 0], &seconds, true);
        assert_eq!(outcome.refused, Vec::<String>::new());
    }

    #[test]
    fn max_age_and_the_schedule_agree_whatever_is_set() {
        for seconds in (5..4_000).chain([86_400, 30 * 86_400]) {
            let policy = schedule(seconds, seconds, 900);
            let age = policy.max_age(&[], Duration::ZERO);
            assert!(age >= Duration::from_secs(1) && policy.reread(&[]) <= Duration::from_mins(1));
            assert!(policy.reread(&[]) + age + CLOCK_TOLERANCE <= policy.publish_ahead, "{seconds}");
        }
        assert_eq!(schedule(90 * 86_400, 86_400, 900).max_age(&[], Duration::ZERO), LONGEST_MAX_AGE);
    }

    #[test]
    fn a_key_goes_through_its_states_and_is_forgotten_when_its_last_token_is_dead() {
        let policy = schedule(1_000, 100, 50);
        let mut keys = vec![key("a", Some(START), Some(100))];
        assert_eq!(policy.due(&keys, START + 899.seconds()), None);
        assert_eq!(policy.due(&keys, START + 900.seconds()), Some(KeyStep::Add));
        keys.push(key("b", None, Some(100)));
        let (at, later) = (START + 905.seconds(), START + 1_005.seconds());
        assert_eq!(policy.due(&keys, at), Some(KeyStep::Schedule { kid: "b".to_owned(), sign_time: later }));
        keys[1].sign_time = Some(later);
        let states = |keys: &[SealedSigningKey], now| keys.iter().map(|key| state(keys, key, now)).collect::<Vec<_>>();
        assert_eq!(states(&keys, later - 1.seconds()), [KeyState::Signing, KeyState::Next]);
        assert_eq!(states(&keys, later), [KeyState::Retired, KeyState::Signing]);
        let over = later + policy.token_lifetime + policy.longest_staleness(&keys);
        assert_eq!(policy.due(&keys, over - 1.seconds()), None);
        assert_eq!(policy.due(&keys, over), Some(KeyStep::Forget { kid: "a".to_owned() }));
    }

    #[test]
    fn after_missed_weeks_the_next_key_is_still_published_ahead() {
        let policy = schedule(90 * 86_400, 86_400, 900);
        let mut keys = vec![key("a", Some(START), Some(86_400))];
        // Nobody was there when the next key was due.
        let back = START + 120.days();
        assert_eq!(policy.due(&keys, back), Some(KeyStep::Add));
        keys.push(key("b", None, Some(86_400)));
        let step = policy.due(&keys, back);
        assert_eq!(step, Some(KeyStep::Schedule { kid: "b".to_owned(), sign_time: back + 1.days() }));
        // Nor when it was due to sign: it has been published since, and signs at once.
        keys[1].sign_time = Some(back + 1.days());
        assert_eq!(signing(&keys, back + 7.days()).map(|key| &*key.kid), Some("b"));
    }

    #[test]
    fn nothing_hangs_on_a_clock_that_was_wrong() {
        let policy = schedule(90 * 86_400, 86_400, 900);
        let far = START + 3_650.days();
        // The only key was made by a clock that was ten years ahead.
        let mut keys = vec![key("a", Some(far), Some(86_400))];
        assert_eq!(signing(&keys, START).map(|key| &*key.kid), Some("a"));
        assert_eq!(policy.due(&keys, START), Some(KeyStep::Schedule { kid: "a".to_owned(), sign_time: START }));
        keys[0].sign_time = Some(START);
        keys.push(key("b", Some(far), Some(86_400)));
        let step = policy.due(&keys, START);
        assert_eq!(step, Some(KeyStep::Schedule { kid: "b".to_owned(), sign_time: START + 1.days() }));
    }

    #[test]
    fn a_key_of_a_release_without_rotation_has_signed_since_it_was_made() {
        let keys = [key("a", None, None)];
        assert_eq!(signs_since(&keys[0]), Some(START));
        let policy = schedule(90 * 86_400, 86_400, 900);
        assert_eq!(policy.due(&keys, START + 88.days()), None);
        assert_eq!(policy.due(&keys, START + 89.days()), Some(KeyStep::Add));
    }

    #[test]
    fn bringing_the_next_key_forward_does_not_cut_its_time() {
        let policy = schedule(90 * 86_400, 86_400, 900);
        let mut keys = vec![key("a", Some(START), Some(86_400))];
        let now = START + 1.days();
        assert_eq!(policy.bring_forward(&keys, now), Some(KeyStep::Add));
        keys.push(key("b", None, Some(86_400)));
        let sign_time = now + 1.days();
        assert_eq!(policy.bring_forward(&keys, now), Some(KeyStep::Schedule { kid: "b".to_owned(), sign_time }));
        keys[1].sign_time = Some(sign_time);
        assert_eq!(policy.bring_forward(&keys, now + 1.seconds()), None);
    }
}
