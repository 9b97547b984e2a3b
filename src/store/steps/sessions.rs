//! Parts of the steps of sessions that are the same on every backend. The steps themselves stand with the backends,
//! since their locks and statements differ.

use crate::{
    domain::{
        audit::{Action, AuditTarget},
        ports::{Logout, LogoutOutcome, Rotation, RotationOutcome},
        refresh::LogoutTarget,
        session::{RefreshGrant, RevokeReason},
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
