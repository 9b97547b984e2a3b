//! Sessions.

use std::time::Duration;

use async_trait::async_trait;
use time::OffsetDateTime;

use crate::domain::{
    SessionId, UserId,
    audit::{Action, Occasion},
    token::RefreshGrant,
};

use super::{SqliteStore, Time, Tx, accounts::user_by_id, audit, microseconds, span};
use crate::store::{
    About, AttemptSubject, LoginAttempt, Logout, LogoutOutcome, NewSession, Presented, Reservation, Revocation,
    RevokeReason, Rotation, RotationOutcome, SessionOpening, SessionStore, StoreError,
    rows::{LeavingRow, PresentedRow, RevocationRow, user_columns},
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
            let (user_id, session_id) = (session.grant.user_id, session.grant.session_id);
            let (occasion, attempt) = (session.occasion.by(user_id), session.attempt);
            insert_session(&mut tx, session).await?;
            if let Some(subject) = attempt {
                forgive(&mut tx, subject).await?;
            }
            audit::record(&mut tx, Action::Login, &occasion, About::session(user_id, session_id)).await?;
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
            .bind(microseconds(rotation.occasion.now))
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
                    let (user, session) = (rotation.next.user_id, rotation.next.session_id);
                    revoke(&mut tx, session, RevokeReason::TokenReused, &rotation.occasion).await?;
                    let about = About::session(user, session);
                    audit::record(&mut tx, Action::RefreshReused, &rotation.occasion, about).await?;
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
            if revoke(&mut tx, logout.session_id, leaving.reason, &logout.occasion).await? {
                let about = About::session(logout.user_id, logout.session_id);
                let occasion = leaving.occasion(&logout);
                audit::record(&mut tx, leaving.reason.action(), &occasion, about).await?;
            }
            if leaving.others_too {
                revoke_all(&mut tx, logout.user_id, RevokeReason::EndedElsewhere, &logout.occasion).await?;
            }
            tx.commit().await?;
            Ok(leaving.outcome)
        })
        .await
    }

    async fn reserve_attempt(&self, attempt: LoginAttempt) -> Result<Reservation, StoreError> {
        let writer = self.writer.clone();
        to_the_end(async move {
            let mut tx = Self::begin(&writer).await?;
            let (now, policy) = (microseconds(attempt.now), attempt.policy);
            let before: Option<(i64, Time, Time)> =
                sqlx::query_as("SELECT failures, blocked_until, forget_time FROM login_attempts WHERE subject = $1")
                    .bind(attempt.subject.0.as_slice())
                    .fetch_optional(&mut *tx)
                    .await?;
            let failures = match before {
                Some((_, blocked_until, _)) if blocked_until > now => {
                    let retry_after = Duration::from_micros(blocked_until.abs_diff(now));
                    return Ok(Reservation::Blocked { retry_after });
                }
                Some((failures, _, forget_time)) if forget_time > now => failures + 1,
                Some(_) | None => 1,
            };
            sqlx::query(
                "INSERT INTO login_attempts (subject, failures, blocked_until, forget_time) VALUES ($1, $2, $3, $4) \
                 ON CONFLICT (subject) DO UPDATE SET failures = $2, blocked_until = $3, forget_time = $4",
            )
            .bind(attempt.subject.0.as_slice())
            .bind(failures)
            .bind(now + span(policy.delay_after(failures)))
            .bind(now + span(policy.window))
            .execute(&mut *tx)
            .await?;
            tx.commit().await?;
            Ok(Reservation::Reserved)
        })
        .await
    }

    async fn guess_was_right(&self, subject: AttemptSubject) -> Result<(), StoreError> {
        let writer = self.writer.clone();
        to_the_end(async move {
            let mut tx = Self::begin(&writer).await?;
            forgive(&mut tx, subject).await?;
            tx.commit().await?;
            Ok(())
        })
        .await
    }

    async fn guess_was_not_made(&self, subject: AttemptSubject) -> Result<(), StoreError> {
        let writer = self.writer.clone();
        to_the_end(async move {
            // Where it brought a pause about, that is over too: nobody else got through since.
            sqlx::query(
                "UPDATE login_attempts SET failures = failures - 1, blocked_until = 0 \
                 WHERE subject = $1 AND failures > 0",
            )
            .bind(subject.0.as_slice())
            .execute(&writer)
            .await?;
            Ok(())
        })
        .await
    }

    async fn login_failed(&self, user: Option<UserId>, occasion: Occasion) -> Result<(), StoreError> {
        let writer = self.writer.clone();
        to_the_end(async move {
            let mut tx = Self::begin(&writer).await?;
            let about = About { user, ..About::default() };
            audit::record(&mut tx, Action::LoginFailed, &occasion, about).await?;
            tx.commit().await?;
            Ok(())
        })
        .await
    }

    async fn revocations(&self, after: i64, _missed: &[i64]) -> Result<Vec<Revocation>, StoreError> {
        // One writer: what is seen has no gaps.
        sqlx::query_as::<_, RevocationRow<Time>>(
            "SELECT number, session_id, user_id, roles, forget_time FROM revocations \
             WHERE number > $1 ORDER BY number",
        )
        .bind(after)
        .fetch_all(&self.readers)
        .await?
        .into_iter()
        .map(RevocationRow::into_revocation)
        .collect()
    }

    async fn revocation_written(&self) {
        // One process: it reads what it wrote before it answers. What the command line writes, the next poll finds.
        std::future::pending::<()>().await;
    }

    async fn forget_revocations(&self, now: OffsetDateTime) -> Result<(), StoreError> {
        let writer = self.writer.clone();
        to_the_end(async move {
            for statement in
                ["DELETE FROM revocations WHERE forget_time < $1", "DELETE FROM login_attempts WHERE forget_time < $1"]
            {
                sqlx::query(statement).bind(microseconds(now)).execute(&writer).await?;
            }
            Ok(())
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
    .bind(microseconds(rotation.occasion.now))
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Ends a session, if it has not ended yet. `false` if it has.
pub(super) async fn revoke(
    tx: &mut Tx,
    session: SessionId,
    reason: RevokeReason,
    occasion: &Occasion,
) -> Result<bool, StoreError> {
    sqlx::query(
        "INSERT INTO revocations (session_id, revoke_time, forget_time) \
         SELECT id, $2, $3 FROM sessions WHERE id = $1 AND revoke_time IS NULL",
    )
    .bind(session.0)
    .bind(microseconds(occasion.now))
    .bind(microseconds(occasion.forget_time))
    .execute(&mut **tx)
    .await?;
    let revoked =
        sqlx::query("UPDATE sessions SET revoke_time = $2, revoke_reason = $3 WHERE id = $1 AND revoke_time IS NULL")
            .bind(session.0)
            .bind(microseconds(occasion.now))
            .bind(reason.as_str())
            .execute(&mut **tx)
            .await?;
    Ok(revoked.rows_affected() == 1)
}

pub(super) async fn insert_session(tx: &mut Tx, session: NewSession) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO sessions (id, user_id, create_time, end_time, generation, refresh_hash, \
         refresh_issue_time, refresh_expire_time, last_refresh_time, client_ip, user_agent) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $3, $9, $10)",
    )
    .bind(session.grant.session_id.0)
    .bind(session.grant.user_id.0)
    .bind(microseconds(session.occasion.now))
    .bind(microseconds(session.grant.session_end_time))
    .bind(session.grant.generation)
    .bind(session.refresh_hash.0.as_slice())
    .bind(microseconds(session.grant.issue_time))
    .bind(microseconds(session.grant.expire_time))
    .bind(session.occasion.client_ip.map(|ip| ip.to_string()))
    .bind(session.user_agent)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Ends every session of a user that has not ended yet; returns how many.
pub(super) async fn revoke_all(
    tx: &mut Tx,
    user: UserId,
    reason: RevokeReason,
    occasion: &Occasion,
) -> Result<u64, StoreError> {
    sqlx::query(
        "INSERT INTO revocations (session_id, revoke_time, forget_time) \
         SELECT id, $2, $3 FROM sessions WHERE user_id = $1 AND revoke_time IS NULL",
    )
    .bind(user.0)
    .bind(microseconds(occasion.now))
    .bind(microseconds(occasion.forget_time))
    .execute(&mut **tx)
    .await?;
    let revoked = sqlx::query(
        "UPDATE sessions SET revoke_time = $2, revoke_reason = $3 WHERE user_id = $1 AND revoke_time IS NULL",
    )
    .bind(user.0)
    .bind(microseconds(occasion.now))
    .bind(reason.as_str())
    .execute(&mut **tx)
    .await?;
    Ok(revoked.rows_affected())
}

/// The password was right, or is a new one: whatever was guessed before does not count any more.
pub(super) async fn forgive(tx: &mut Tx, subject: AttemptSubject) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM login_attempts WHERE subject = $1").bind(subject.0.as_slice()).execute(&mut **tx).await?;
    Ok(())
}
