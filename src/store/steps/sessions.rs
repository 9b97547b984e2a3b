//! Parts of the steps of sessions that are the same on every backend. The steps themselves stand with the backends,
//! since their locks and statements differ.

use crate::{
    domain::{
        audit::{Action, AuditContext, AuditTarget},
        ports::{Logout, LogoutOutcome, NewSession, Rotation, RotationOutcome, SessionOpening, SurplusSessions},
        refresh::LogoutTarget,
        session::{RefreshGrant, RevokeReason},
    },
    error::StoreError,
    store::{rows::PresentedSession, statement::Statement},
};

use super::transaction::{WriteTransaction, forgive_attempts};

/// The answer to the previous refresh token, presented again: the same successor.
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

/// Opens a session, alone: every other step that locks the user comes before it or after it.
pub(in crate::store) async fn open_session(
    mut tx: impl WriteTransaction,
    session: NewSession,
) -> Result<SessionOpening, StoreError> {
    if !tx.lock_enabled_user(session.grant.user_id, session.password_version).await? {
        return Ok(SessionOpening::Refused);
    }
    let (user_id, session_id) = (session.grant.user_id, session.grant.session_id);
    let (context, attempt, most) = (session.context.by(user_id), session.attempt, session.most);
    if let Some(rehash) = &session.rehash {
        let statement = Statement::new("UPDATE users SET password_hash = $2 WHERE id = $1 AND password_hash = $3")
            .bind(user_id.0)
            .bind(rehash.to.as_str())
            .bind(rehash.from.as_str());
        tx.run(statement).await?;
    }
    tx.insert_session(session).await?;
    if let Some(subject) = attempt {
        tx.run(forgive_attempts(subject)).await?;
    }
    tx.record(Action::Login, &context, AuditTarget::session(user_id, session_id)).await?;
    let too_many = tx.count_open_sessions(user_id, context.now).await? > u64::from(most);
    let user = tx.user(user_id).await?;
    tx.commit().await?;
    Ok(if too_many { SessionOpening::OpenedTooMany(user) } else { SessionOpening::Opened(user) })
}

/// Ends the sessions of a user that were not used for the longest time, as many as there are events for. Returns whether
/// there are more of them than the user may have.
pub(in crate::store) async fn end_surplus_sessions(
    mut tx: impl WriteTransaction,
    surplus: SurplusSessions,
) -> Result<bool, StoreError> {
    let SurplusSessions { user, most, context, events } = surplus;
    if tx.lock_user(user).await?.is_none() {
        return Ok(false);
    }
    let open = tx.count_open_sessions(user, context.now).await?;
    let count = open.saturating_sub(most.into());
    for event in events.iter().take(usize::try_from(count).unwrap_or(usize::MAX)) {
        let Some(session) = tx.least_used_session(user, context.now).await? else {
            break;
        };
        tx.revoke(session, RevokeReason::TooMany, &context).await?;
        let target = AuditTarget::session(user, session).detail("too many sessions".to_owned());
        tx.record(RevokeReason::TooMany.action(), &AuditContext { event: *event, ..context }, target).await?;
    }
    tx.commit().await?;
    Ok(count > events.len() as u64)
}
