//! The rules for a presented refresh token: what refresh and logout make of it. A backend reads the session's row,
//! locks it, and asks here, so that every backend decides alike.

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
    /// Whether the last rotation is at most the retry window old, by the database's clock. One from further ahead is not: a
    /// clock was wrong.
    pub within_retry_window: bool,
}

/// What a presented refresh token is to its session.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum TokenState {
    /// The live token: rotate.
    Current,
    /// The token before it, within the retry window: return its successor again.
    Previous,
    /// An older token: it was stolen, or its client lost count. End the session.
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
        let is_retry = rotation.presented_generation == self.generation - 1
            && !rotation.retry_window.is_zero()
            && self.within_retry_window;
        if is_retry { TokenState::Previous } else { TokenState::Consumed }
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
