//! Parts of the steps of sessions that are the same on every backend. The steps themselves stand with the backends,
//! since their locks and statements differ.

use crate::{
    domain::{
        audit::{Action, AuditContext, AuditTarget},
        ids::UserId,
        ports::{Logout, LogoutOutcome, Rotation, RotationOutcome},
        refresh::LogoutTarget,
        session::{RefreshGrant, RevokeReason},
        throttle::AttemptSubject,
    },
    error::StoreError,
    store::rows::PresentedSession,
};

use super::transaction::WriteTransaction;

/// The answer to the previous refresh token, presented again within the retry window: the same successor.
pub(in crate::store) fn replayed(session: PresentedSession, rotation: &Rotation) -> RotationOutcome {
    RotationOutcome::Replayed {
        grant: RefreshGrant {
            generation: session.state.generation,
            issue_time: session.refresh_issue_time,
            expire_time: session.state.refresh_expire_time,
            ..rotation.next.clone()
        },
        hash: session.state.refresh_hash,
        user: session.user,
    }
}

/// A session goes on from a token that was minted before the database was restored from a backup. The tokens before it are
/// used up, and whoever presents one ends the session.
pub(in crate::store) async fn carried_on(
    mut tx: impl WriteTransaction,
    session: PresentedSession,
    rotation: &Rotation,
) -> Result<RotationOutcome, StoreError> {
    let target = AuditTarget::session(rotation.next.user_id, rotation.next.session_id);
    let context = rotation.context.by(rotation.next.user_id);
    tx.record(Action::RefreshAfterRestore, &context, target).await?;
    tx.commit().await?;
    Ok(RotationOutcome::Rotated(session.user))
}

/// Ends the session of a consumed refresh token. This is committed before the caller is answered, so that whoever stole
/// the token loses the session first.
pub(in crate::store) async fn end_reused_session(
    mut tx: impl WriteTransaction,
    rotation: &Rotation,
) -> Result<RotationOutcome, StoreError> {
    let (user, session) = (rotation.next.user_id, rotation.next.session_id);
    tx.revoke(session, RevokeReason::TokenReused, &rotation.context).await?;
    tx.record(Action::RefreshReused, &rotation.context, AuditTarget::session(user, session)).await?;
    tx.commit().await?;
    Ok(RotationOutcome::Reused)
}

/// Ends the session of a token that was presented to log out, and the user's other sessions where the rules say so.
pub(in crate::store) async fn apply_logout(
    mut tx: impl WriteTransaction,
    target: &LogoutTarget,
    logout: &Logout,
) -> Result<LogoutOutcome, StoreError> {
    let decision = target.decide(logout);
    if tx.revoke(logout.session_id, decision.reason, &logout.context).await? {
        let target = AuditTarget::session(logout.user_id, logout.session_id);
        tx.record(decision.reason.action(), &decision.audit_context(logout), target).await?;
    }
    if decision.others_too {
        tx.revoke_all(logout.user_id, RevokeReason::EndedElsewhere, &logout.context).await?;
    }
    tx.commit().await?;
    Ok(decision.outcome)
}

/// Ends the session of a user that was not used for the longest time, if there are more open ones than `most`.
pub(in crate::store) async fn end_surplus_session(
    mut tx: impl WriteTransaction,
    user: UserId,
    most: u32,
    context: AuditContext,
) -> Result<bool, StoreError> {
    if tx.lock_user(user).await?.is_none() || tx.count_open_sessions(user, context.now).await? <= u64::from(most) {
        return Ok(false);
    }
    let Some(session) = tx.least_used_session(user, context.now).await? else {
        return Ok(false);
    };
    tx.revoke(session, RevokeReason::TooMany, &context).await?;
    let target = AuditTarget::session(user, session).detail("too many sessions".to_owned());
    tx.record(RevokeReason::TooMany.action(), &context, target).await?;
    tx.commit().await?;
    Ok(true)
}

/// The key of an attempt's row; before all others if there is none.
pub(in crate::store) fn subject_bytes(subject: Option<AttemptSubject>) -> Vec<u8> {
    subject.map(|subject| subject.0.to_vec()).unwrap_or_default()
}

/// The subject with this key.
pub(in crate::store) fn subject(key: Vec<u8>) -> Result<AttemptSubject, StoreError> {
    let key = key.try_into().map_err(|_| StoreError::broken("column login_attempts.subject has not 32 bytes"))?;
    Ok(AttemptSubject(key))
}
