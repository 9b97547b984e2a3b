//! Sessions.

use async_trait::async_trait;
use time::OffsetDateTime;

use crate::domain::{SessionId, UserId, token::RefreshGrant};

use super::{SqliteStore, Time, Tx, accounts::user_by_id, microseconds, span};
use crate::store::{
    Logout, LogoutOutcome, NewSession, Presented, RevokeReason, Rotation, RotationOutcome, SessionOpening,
    SessionStore, StoreError,
    rows::{LeavingRow, PresentedRow, user_columns},
    to_the_end,
};

#[async_trait]
impl SessionStore for SqliteStore {
    async fn open_session(&self, session: NewSession) -> Result<SessionOpening, StoreError> {
        let writer = self.writer.clone();
        to_the_end(async move {
            let mut tx = Self::begin(&writer).await?;
            let unchanged: bool = sqlx::query_scalar(
                "SELECT EXISTS (SELECT 1 FROM users u WHERE u.id = $1 AND u.password_version = $2 AND NOT u.disabled)",
            )
            .bind(session.grant.user_id.0)
            .bind(session.password_version)
            .fetch_one(&mut *tx)
            .await?;
            if !unchanged {
                return Ok(SessionOpening::Refused);
            }
            if let Some(rehash) = &session.rehash {
                sqlx::query("UPDATE users SET password_hash = $2 WHERE id = $1 AND password_hash = $3")
                    .bind(session.grant.user_id.0)
                    .bind(rehash.to.as_str())
                    .bind(rehash.from.as_str())
                    .execute(&mut *tx)
                    .await?;
            }
            let user_id = session.grant.user_id;
            insert_session(&mut tx, session).await?;
            let user = user_by_id(&mut tx, user_id).await?;
            tx.commit().await?;
            Ok(SessionOpening::Opened(user))
        })
        .await
    }

    async fn rotate_refresh(&self, rotation: Rotation) -> Result<RotationOutcome, StoreError> {
        let writer = self.writer.clone();
        to_the_end(async move {
            let mut tx = Self::begin(&writer).await?;
            let Some(session) = sqlx::query_as::<_, PresentedRow<Time>>(concat!(
                "SELECT ",
                user_columns!(),
                ", s.generation, s.refresh_hash, s.refresh_issue_time, ",
                "s.refresh_expire_time, s.revoke_time, $3 - s.last_refresh_time <= $4 AS within_retry_window ",
                "FROM sessions s JOIN users u ON u.id = s.user_id WHERE s.id = $1 AND s.user_id = $2"
            ))
            .bind(rotation.next.session_id.0)
            .bind(rotation.next.user_id.0)
            .bind(microseconds(rotation.now))
            .bind(span(rotation.retry_window))
            .fetch_optional(&mut *tx)
            .await?
            else {
                return Ok(RotationOutcome::Dead);
            };
            let session = session.into_session()?;
            match session.state.judge(&rotation) {
                Presented::Live => {
                    rotate(&mut tx, &rotation).await?;
                    tx.commit().await?;
                    Ok(RotationOutcome::Rotated(session.user))
                }
                Presented::Previous => Ok(RotationOutcome::Retried {
                    grant: RefreshGrant {
                        generation: session.state.generation,
                        issue_time: session.refresh_issue_time,
                        expire_time: session.state.refresh_expire_time,
                        ..rotation.next
                    },
                    hash: session.state.refresh_hash,
                    user: session.user,
                }),
                Presented::UsedUp => {
                    // Committed before anybody is answered: the thief must not outlive the alarm.
                    revoke(&mut tx, rotation.next.session_id, rotation.now, RevokeReason::TokenReused).await?;
                    tx.commit().await?;
                    Ok(RotationOutcome::Reused)
                }
                Presented::OfDeadSession => Ok(RotationOutcome::Dead),
            }
        })
        .await
    }

    async fn logout(&self, logout: Logout) -> Result<LogoutOutcome, StoreError> {
        let writer = self.writer.clone();
        to_the_end(async move {
            let mut tx = Self::begin(&writer).await?;
            let Some(session) = sqlx::query_as::<_, LeavingRow<Time>>(
                "SELECT generation, refresh_expire_time, revoke_reason FROM sessions WHERE id = $1 AND user_id = $2",
            )
            .bind(logout.session_id.0)
            .bind(logout.user_id.0)
            .fetch_optional(&mut *tx)
            .await?
            else {
                return Ok(LogoutOutcome::Refused);
            };
            let leaving = session.into_session()?.judge(&logout);
            revoke(&mut tx, logout.session_id, logout.now, leaving.reason).await?;
            if leaving.others_too {
                revoke_all(&mut tx, logout.user_id, logout.now, RevokeReason::EndedElsewhere).await?;
            }
            tx.commit().await?;
            Ok(leaving.outcome)
        })
        .await
    }

    async fn forget_ended_sessions(&self, now: OffsetDateTime, limit: u32) -> Result<u64, StoreError> {
        let writer = self.writer.clone();
        to_the_end(async move {
            let deleted = sqlx::query(
                "DELETE FROM sessions WHERE id IN (SELECT id FROM sessions WHERE end_time < $1 \
                 ORDER BY end_time LIMIT $2)",
            )
            .bind(microseconds(now))
            .bind(i64::from(limit))
            .execute(&writer)
            .await?;
            Ok(deleted.rows_affected())
        })
        .await
    }
}

/// Puts the next token in the place of the presented one, which was found to be the live one.
async fn rotate(tx: &mut Tx, rotation: &Rotation) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE sessions SET generation = $2, refresh_hash = $3, refresh_issue_time = $4, refresh_expire_time = $5, \
         last_refresh_time = $6 WHERE id = $1",
    )
    .bind(rotation.next.session_id.0)
    .bind(rotation.next.generation)
    .bind(rotation.next_hash.0.as_slice())
    .bind(microseconds(rotation.next.issue_time))
    .bind(microseconds(rotation.next.expire_time))
    .bind(microseconds(rotation.now))
    .execute(&mut **tx)
    .await?;
    Ok(())
}

async fn revoke(tx: &mut Tx, session: SessionId, now: OffsetDateTime, reason: RevokeReason) -> Result<(), StoreError> {
    sqlx::query("UPDATE sessions SET revoke_time = $2, revoke_reason = $3 WHERE id = $1 AND revoke_time IS NULL")
        .bind(session.0)
        .bind(microseconds(now))
        .bind(reason.as_str())
        .execute(&mut **tx)
        .await?;
    Ok(())
}

pub(super) async fn insert_session(tx: &mut Tx, session: NewSession) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO sessions (id, user_id, create_time, end_time, generation, refresh_hash, \
         refresh_issue_time, refresh_expire_time, last_refresh_time, client_ip, user_agent) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $3, $9, $10)",
    )
    .bind(session.grant.session_id.0)
    .bind(session.grant.user_id.0)
    .bind(microseconds(session.create_time))
    .bind(microseconds(session.grant.session_end_time))
    .bind(session.grant.generation)
    .bind(session.refresh_hash.0.as_slice())
    .bind(microseconds(session.grant.issue_time))
    .bind(microseconds(session.grant.expire_time))
    .bind(session.client_ip.map(|ip| ip.to_string()))
    .bind(session.user_agent)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Ends every session of a user that has not ended yet.
pub(super) async fn revoke_all(
    tx: &mut Tx,
    user: UserId,
    now: OffsetDateTime,
    reason: RevokeReason,
) -> Result<(), StoreError> {
    sqlx::query("UPDATE sessions SET revoke_time = $2, revoke_reason = $3 WHERE user_id = $1 AND revoke_time IS NULL")
        .bind(user.0)
        .bind(microseconds(now))
        .bind(reason.as_str())
        .execute(&mut **tx)
        .await?;
    Ok(())
}
