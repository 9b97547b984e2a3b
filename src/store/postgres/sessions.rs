//! Sessions.

use std::time::Duration;

use async_trait::async_trait;
use sqlx::{Executor, Postgres};
use time::OffsetDateTime;

use crate::domain::{
    SessionId, UserId,
    account::User,
    audit::{Action, Occasion},
    token::RefreshGrant,
};

use super::{PostgresStore, Time, Tx, accounts::user_by_id, audit};
use crate::store::{
    About, AttemptSubject, LoginAttempt, Logout, LogoutOutcome, NewSession, Presented, Reservation, Revocation,
    RevokeReason, Rotation, RotationOutcome, SessionOpening, SessionStore, StoreError,
    rows::{LeavingRow, PresentedRow, RevocationRow, UserRow, user_columns},
    to_the_end,
};

#[async_trait]
impl SessionStore for PostgresStore {
    async fn open_session(&self, session: NewSession) -> Result<SessionOpening, StoreError> {
        let pool = self.pool()?.clone();
        to_the_end(async move {
            let mut tx = pool.begin().await?;
            // The user's row decides between this and whatever ends all of the user's sessions: that takes the same
            // row FOR NO KEY UPDATE first, so it either sees this session or has this see its work. Logins share the
            // lock among themselves, unless one is to write the row.
            let lock = if session.rehash.is_some() {
                "SELECT u.id FROM users u WHERE u.id = $1 AND u.password_version = $2 AND NOT u.disabled \
                 FOR NO KEY UPDATE"
            } else {
                "SELECT u.id FROM users u WHERE u.id = $1 AND u.password_version = $2 AND NOT u.disabled FOR SHARE"
            };
            let locked = sqlx::query(lock)
                .bind(session.grant.user_id.0)
                .bind(session.password_version)
                .fetch_optional(&mut *tx)
                .await?;
            if locked.is_none() {
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
        let pool = self.pool()?.clone();
        to_the_end(async move {
            // Nearly every refresh ends here, in one round trip. Of several that present one generation the first
            // takes the row; the others wait for it and then find another generation.
            if let Some(user) = rotate(&pool, &rotation).await? {
                return Ok(RotationOutcome::Rotated(user));
            }
            let mut tx = pool.begin().await?;
            let Some(session) = sqlx::query_as::<_, PresentedRow<Time>>(concat!(
                "SELECT ",
                user_columns!(),
                ", s.generation, s.refresh_hash, s.refresh_issue_time, ",
                "s.refresh_expire_time, s.revoke_time, ",
                "clock_timestamp() - s.last_refresh_time <= make_interval(secs => $3) AS within_retry_window ",
                "FROM sessions s JOIN users u ON u.id = s.user_id WHERE s.id = $1 AND s.user_id = $2 FOR UPDATE OF s"
            ))
            .bind(rotation.next.session_id.0)
            .bind(rotation.next.user_id.0)
            .bind(rotation.retry_window.as_secs_f64())
            .fetch_optional(&mut *tx)
            .await?
            else {
                return Ok(RotationOutcome::Dead);
            };
            let session = session.into_session()?;
            match session.state.judge(&rotation) {
                // It was not live a moment ago: its user was enabled since.
                Presented::Live => {
                    let rotated = rotate(&mut *tx, &rotation).await?;
                    tx.commit().await?;
                    Ok(rotated.map_or(RotationOutcome::Dead, RotationOutcome::Rotated))
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
        let pool = self.pool()?.clone();
        to_the_end(async move {
            let mut tx = pool.begin().await?;
            if logout.everywhere {
                // First the user, then the sessions: a login that has the user's row commits before, and its session
                // is among those that end.
                sqlx::query("SELECT u.id FROM users u WHERE u.id = $1 FOR NO KEY UPDATE")
                    .bind(logout.user_id.0)
                    .execute(&mut *tx)
                    .await?;
            }
            let Some(session) = sqlx::query_as::<_, LeavingRow<Time>>(
                "SELECT generation, refresh_expire_time, revoke_reason FROM sessions WHERE id = $1 AND user_id = $2 FOR UPDATE",
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
        let pool = self.pool()?.clone();
        to_the_end(async move {
            // By this database's clock: no replica's may let guesses through. Of several at once each counts those
            // before it, as they wait for the row.
            let reserved = sqlx::query(
                "INSERT INTO login_attempts AS a (subject, failures, blocked_until, forget_time) \
                 VALUES ($1, 1, clock_timestamp() + make_interval(secs => $6), \
                 clock_timestamp() + make_interval(secs => $5)) \
                 ON CONFLICT (subject) DO UPDATE SET \
                 failures = CASE WHEN a.forget_time <= clock_timestamp() THEN 1 ELSE a.failures + 1 END, \
                 blocked_until = clock_timestamp() + make_interval(secs => CASE \
                 WHEN a.forget_time <= clock_timestamp() THEN $6 WHEN a.failures + 1 < $2 THEN 0 \
                 ELSE least($4, $3 * power(2, least(a.failures + 1 - $2, 30))) END), \
                 forget_time = clock_timestamp() + make_interval(secs => $5) \
                 WHERE a.blocked_until <= clock_timestamp()",
            )
            .bind(attempt.subject.0.as_slice())
            .bind(attempt.policy.max_failures)
            .bind(attempt.policy.first_delay.as_secs_f64())
            .bind(attempt.policy.longest_delay.as_secs_f64())
            .bind(attempt.policy.window.as_secs_f64())
            .bind(attempt.policy.delay_after(1).as_secs_f64())
            .execute(&pool)
            .await?
            .rows_affected();
            if reserved == 1 {
                return Ok(Reservation::Reserved);
            }
            let seconds: Option<f64> = sqlx::query_scalar(
                "SELECT extract(epoch FROM blocked_until - clock_timestamp())::float8 FROM login_attempts \
                 WHERE subject = $1",
            )
            .bind(attempt.subject.0.as_slice())
            .fetch_optional(&pool)
            .await?;
            let retry_after = Duration::try_from_secs_f64(seconds.unwrap_or_default()).unwrap_or_default();
            Ok(Reservation::Blocked { retry_after })
        })
        .await
    }

    async fn guess_was_right(&self, subject: AttemptSubject) -> Result<(), StoreError> {
        let pool = self.pool()?.clone();
        to_the_end(async move {
            let mut tx = pool.begin().await?;
            forgive(&mut tx, subject).await?;
            tx.commit().await?;
            Ok(())
        })
        .await
    }

    async fn guess_was_not_made(&self, subject: AttemptSubject) -> Result<(), StoreError> {
        let pool = self.pool()?.clone();
        to_the_end(async move {
            // Where it brought a pause about, that is over too: nobody else got through since.
            sqlx::query(
                "UPDATE login_attempts SET failures = failures - 1, blocked_until = 'epoch' \
                 WHERE subject = $1 AND failures > 0",
            )
            .bind(subject.0.as_slice())
            .execute(&pool)
            .await?;
            Ok(())
        })
        .await
    }

    async fn login_failed(&self, user: Option<UserId>, occasion: Occasion) -> Result<(), StoreError> {
        let pool = self.pool()?.clone();
        to_the_end(async move {
            let mut tx = pool.begin().await?;
            let about = About { user, ..About::default() };
            audit::record(&mut tx, Action::LoginFailed, &occasion, about).await?;
            tx.commit().await?;
            Ok(())
        })
        .await
    }

    async fn revocations(&self, after: i64, missed: &[i64]) -> Result<Vec<Revocation>, StoreError> {
        sqlx::query_as::<_, RevocationRow<Time>>(
            "SELECT number, session_id, user_id, roles, forget_time FROM revocations \
             WHERE number > $1 OR number = ANY($2) ORDER BY number",
        )
        .bind(after)
        .bind(missed)
        .fetch_all(self.pool()?)
        .await?
        .into_iter()
        .map(RevocationRow::into_revocation)
        .collect()
    }

    async fn revocation_written(&self) {
        self.revocation_written.notified().await;
    }

    async fn forget_revocations(&self, now: OffsetDateTime) -> Result<(), StoreError> {
        let pool = self.pool()?.clone();
        to_the_end(async move {
            sqlx::query("DELETE FROM revocations WHERE forget_time < $1").bind(now).execute(&pool).await?;
            // By the clock that counted them: see `reserve_attempt`.
            sqlx::query("DELETE FROM login_attempts WHERE forget_time < clock_timestamp()").execute(&pool).await?;
            Ok(())
        })
        .await
    }

    async fn forget_ended_sessions(&self, now: OffsetDateTime, limit: u32) -> Result<u64, StoreError> {
        let pool = self.pool()?.clone();
        to_the_end(async move {
            let deleted = sqlx::query(
                "DELETE FROM sessions WHERE id IN (SELECT id FROM sessions WHERE end_time < $1 \
                 ORDER BY end_time LIMIT $2 FOR UPDATE SKIP LOCKED)",
            )
            .bind(now)
            .bind(i64::from(limit))
            .execute(&pool)
            .await?;
            Ok(deleted.rows_affected())
        })
        .await
    }
}

/// Puts the next token in the place of the presented one, if that is the live one of a live session.
async fn rotate(
    executor: impl Executor<'_, Database = Postgres>,
    rotation: &Rotation,
) -> Result<Option<User>, StoreError> {
    sqlx::query_as::<_, UserRow<Time>>(concat!(
        "UPDATE sessions s SET generation = $4, refresh_hash = $5, refresh_issue_time = $6, ",
        "refresh_expire_time = $7, last_refresh_time = clock_timestamp() FROM users u ",
        "WHERE s.id = $1 AND s.user_id = $9 AND s.generation = $2 AND s.refresh_hash = $3 AND s.revoke_time IS NULL ",
        "AND s.refresh_expire_time > $8 AND u.id = s.user_id AND NOT u.disabled RETURNING ",
        user_columns!()
    ))
    .bind(rotation.next.session_id.0)
    .bind(rotation.presented_generation)
    .bind(rotation.presented_hash.0.as_slice())
    .bind(rotation.next.generation)
    .bind(rotation.next_hash.0.as_slice())
    .bind(rotation.next.issue_time)
    .bind(rotation.next.expire_time)
    .bind(rotation.occasion.now)
    .bind(rotation.next.user_id.0)
    .fetch_optional(executor)
    .await?
    .map(UserRow::into_user)
    .transpose()
}

/// Ends a session, if it has not ended yet. `false` if it has.
pub(super) async fn revoke(
    tx: &mut Tx,
    session: SessionId,
    reason: RevokeReason,
    occasion: &Occasion,
) -> Result<bool, StoreError> {
    let revoked = sqlx::query(
        "WITH ended AS (UPDATE sessions SET revoke_time = $2, revoke_reason = $3 \
         WHERE id = $1 AND revoke_time IS NULL RETURNING id) \
         INSERT INTO revocations (session_id, revoke_time, forget_time) SELECT id, $2, $4 FROM ended",
    )
    .bind(session.0)
    .bind(occasion.now)
    .bind(reason.as_str())
    .bind(occasion.forget_time)
    .execute(&mut **tx)
    .await?
    .rows_affected();
    audit::notify(tx).await?;
    Ok(revoked == 1)
}

pub(super) async fn insert_session(tx: &mut Tx, session: NewSession) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO sessions (id, user_id, create_time, end_time, generation, refresh_hash, \
         refresh_issue_time, refresh_expire_time, last_refresh_time, client_ip, user_agent) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, clock_timestamp(), $9, $10)",
    )
    .bind(session.grant.session_id.0)
    .bind(session.grant.user_id.0)
    .bind(session.occasion.now)
    .bind(session.grant.session_end_time)
    .bind(session.grant.generation)
    .bind(session.refresh_hash.0.as_slice())
    .bind(session.grant.issue_time)
    .bind(session.grant.expire_time)
    .bind(session.occasion.client_ip.map(|ip| ip.to_string()))
    .bind(session.user_agent)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Ends every session of a user that has not ended yet; returns how many. The caller holds the user's row.
pub(super) async fn revoke_all(
    tx: &mut Tx,
    user: UserId,
    reason: RevokeReason,
    occasion: &Occasion,
) -> Result<u64, StoreError> {
    let revoked = sqlx::query(
        "WITH ended AS (UPDATE sessions SET revoke_time = $2, revoke_reason = $3 \
         WHERE user_id = $1 AND revoke_time IS NULL RETURNING id) \
         INSERT INTO revocations (session_id, revoke_time, forget_time) SELECT id, $2, $4 FROM ended",
    )
    .bind(user.0)
    .bind(occasion.now)
    .bind(reason.as_str())
    .bind(occasion.forget_time)
    .execute(&mut **tx)
    .await?
    .rows_affected();
    audit::notify(tx).await?;
    Ok(revoked)
}

/// The password was right, or is a new one: whatever was guessed before does not count any more.
pub(super) async fn forgive(tx: &mut Tx, subject: AttemptSubject) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM login_attempts WHERE subject = $1").bind(subject.0.as_slice()).execute(&mut **tx).await?;
    Ok(())
}
