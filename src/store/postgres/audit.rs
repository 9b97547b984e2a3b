//! What every step leaves behind: its row in the audit, and the log of revocations that replicas read.

use crate::domain::{
    UserId,
    audit::{Action, Occasion},
    role::Role,
};

use super::{REVOCATIONS, Tx};
use crate::store::{About, StoreError, rows::roles_text};

/// Writes the audit row of a step.
pub(super) async fn record(tx: &mut Tx, action: Action, occasion: &Occasion, about: About) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO audit_events (id, create_time, action, actor_id, user_id, session_id, client_ip, detail) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
    )
    .bind(occasion.event.0)
    .bind(occasion.now)
    .bind(action.as_str())
    .bind(occasion.actor.map(|actor| actor.0))
    .bind(about.user.map(|user| user.0))
    .bind(about.session.map(|session| session.0))
    .bind(occasion.client_ip.map(|ip| ip.to_string()))
    .bind(about.detail)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Tells every replica which roles an account has from now on.
pub(super) async fn roles_changed(
    tx: &mut Tx,
    user: UserId,
    roles: &[Role],
    occasion: &Occasion,
) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO revocations (user_id, roles, revoke_time, forget_time) VALUES ($1, $2, $3, $4)")
        .bind(user.0)
        .bind(roles_text(roles))
        .bind(occasion.now)
        .bind(occasion.forget_time)
        .execute(&mut **tx)
        .await?;
    notify(tx).await
}

/// Wakes the replicas that listen, when this commits; the others poll.
pub(super) async fn notify(tx: &mut Tx) -> Result<(), StoreError> {
    sqlx::query("SELECT pg_notify($1, '')").bind(REVOCATIONS).execute(&mut **tx).await?;
    Ok(())
}
