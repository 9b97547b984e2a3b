//! The steps of sessions and password attempts, in PostgreSQL's dialect, and the log of revocations.

use std::time::Duration;

use async_trait::async_trait;
use sqlx::{Executor, Postgres};
use time::OffsetDateTime;

use crate::{
    domain::{
        account::User,
        audit::AuditContext,
        ids::UserId,
        ports::{
            LoginAttempt, Logout, LogoutOutcome, NewSession, Reservation, Revocation, Rotation, RotationOutcome,
            SessionOpening, SessionStore,
        },
        refresh::TokenState,
        throttle::AttemptSubject,
    },
    error::StoreError,
    store::{
        rows::{LogoutTargetRow, RevocationRow, StoredSessionRow, UserRow, user_columns},
        shared::{Stamp, run_to_completion},
        steps::{self, Backend as _, WriteTransaction as _},
    },
};

use super::{PostgresStore, transaction::Tx};

#[async_trait]
impl SessionStore for PostgresStore {
    async fn open_session(&self, session: NewSession) -> Result<SessionOpening, StoreError> {
        steps::write(self, |mut tx| async move {
            // The row of the user decides between this step and one that ends all sessions of the user. That step locks
            // the row FOR NO KEY UPDATE first, so either it sees this session, or this step sees what it has changed.
            // Logins share the lock, unless they write the row.
            let lock = if session.rehash.is_some() {
                "SELECT id FROM users WHERE id = $1 AND password_version = $2 AND NOT disabled FOR NO KEY UPDATE"
            } else {
                "SELECT id FROM users WHERE id = $1 AND password_version = $2 AND NOT disabled FOR SHARE"
            };
            let locked = sqlx::query(lock)
                .bind(session.grant.user_id.0)
                .bind(session.password_version)
                .fetch_optional(&mut *tx.sql)
                .await?;
            if locked.is_none() {
                return Ok(SessionOpening::Refused);
            }
            steps::insert_opened_session(tx, session).await
        })
        .await
    }

    async fn rotate_refresh(&self, rotation: Rotation) -> Result<RotationOutcome, StoreError> {
        let pool = self.pool()?.clone();
        let backend = self.clone();
        run_to_completion(async move {
            // Nearly every refresh ends here, in one round trip. Of several that present the same generation, the first
            // takes the row; the others wait for it and then find another generation.
            if let Some(user) = rotate(&pool, &rotation).await? {
                return Ok(RotationOutcome::Rotated(user));
            }
            classify(backend.begin().await?, rotation).await
        })
        .await
    }

    async fn logout(&self, logout: Logout) -> Result<LogoutOutcome, StoreError> {
        steps::write(self, |mut tx| async move {
            if logout.everywhere {
                // The user is locked before the sessions: a login that holds the user's row commits first, and its
                // session is among those that end.
                sqlx::query("SELECT id FROM users WHERE id = $1 FOR NO KEY UPDATE")
                    .bind(logout.user_id.0)
                    .execute(&mut *tx.sql)
                    .await?;
            }
            let target = sqlx::query_as::<_, LogoutTargetRow>(
                "SELECT generation, refresh_expire_time, revoke_reason FROM sessions \
                 WHERE id = $1 AND user_id = $2 FOR UPDATE",
            )
            .bind(logout.session_id.0)
            .bind(logout.user_id.0)
            .fetch_optional(&mut *tx.sql)
            .await?;
            match target {
                Some(target) => steps::apply_logout(tx, &target.into_target(), &logout).await,
                None => Ok(LogoutOutcome::Refused),
            }
        })
        .await
    }

    async fn reserve_attempt(&self, attempt: LoginAttempt) -> Result<Reservation, StoreError> {
        let pool = self.pool()?.clone();
        run_to_completion(async move {
            // Measured by the database's clock, since the clock of a replica may be wrong. Of several attempts at the
            // same time each counts those before it, because they wait for the row.
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

    async fn attempt_succeeded(&self, subject: AttemptSubject) -> Result<(), StoreError> {
        steps::write(self, move |mut tx| async move {
            tx.reset_attempts(subject).await?;
            tx.commit().await
        })
        .await
    }

    async fn attempt_abandoned(&self, subject: AttemptSubject) -> Result<(), StoreError> {
        let pool = self.pool()?.clone();
        run_to_completion(async move {
            // If this attempt started a pause, lift it: no other attempt was reserved in between.
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

    async fn login_failed(&self, user: Option<UserId>, context: AuditContext) -> Result<(), StoreError> {
        steps::write(self, move |tx| steps::login_failed(tx, user, context)).await
    }

    async fn revocations(&self, after: i64, missed: &[i64]) -> Result<Vec<Revocation>, StoreError> {
        sqlx::query_as::<_, RevocationRow>(
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

    async fn purge_revocations(&self, now: OffsetDateTime) -> Result<(), StoreError> {
        let pool = self.pool()?.clone();
        run_to_completion(async move {
            sqlx::query("DELETE FROM revocations WHERE forget_time < $1").bind(Stamp(now)).execute(&pool).await?;
            // By the same clock as in `reserve_attempt`.
            sqlx::query("DELETE FROM login_attempts WHERE forget_time < clock_timestamp()").execute(&pool).await?;
            Ok(())
        })
        .await
    }

    async fn purge_sessions(&self, now: OffsetDateTime, limit: u32) -> Result<u64, StoreError> {
        let pool = self.pool()?.clone();
        run_to_completion(async move {
            let deleted = sqlx::query(
                "DELETE FROM sessions WHERE id IN (SELECT id FROM sessions WHERE end_time < $1 \
                 ORDER BY end_time LIMIT $2 FOR UPDATE SKIP LOCKED)",
            )
            .bind(Stamp(now))
            .bind(i64::from(limit))
            .execute(&pool)
            .await?;
            Ok(deleted.rows_affected())
        })
        .await
    }
}

/// Classifies a refresh token that was not the live one a moment ago, with its session locked.
async fn classify(mut tx: Tx, rotation: Rotation) -> Result<RotationOutcome, StoreError> {
    let session = sqlx::query_as::<_, StoredSessionRow>(concat!(
        "SELECT ",
        user_columns!(),
        ", s.generation, s.refresh_hash, s.refresh_issue_time, s.refresh_expire_time, s.revoke_time, ",
        "clock_timestamp() - s.last_refresh_time <= make_interval(secs => $3) AS within_retry_window ",
        "FROM sessions s JOIN users u ON u.id = s.user_id WHERE s.id = $1 AND s.user_id = $2 FOR UPDATE OF s"
    ))
    .bind(rotation.next.session_id.0)
    .bind(rotation.next.user_id.0)
    .bind(rotation.retry_window.as_secs_f64())
    .fetch_optional(&mut *tx.sql)
    .await?;
    let Some(session) = session else {
        return Ok(RotationOutcome::Invalid);
    };
    let session = session.into_session()?;
    match session.state.classify(&rotation) {
        // The user was disabled a moment ago and has been enabled since.
        TokenState::Current => {
            let rotated = rotate(&mut *tx.sql, &rotation).await?;
            tx.commit().await?;
            Ok(rotated.map_or(RotationOutcome::Invalid, RotationOutcome::Rotated))
        }
        TokenState::Previous => Ok(steps::replayed(session, &rotation)),
        TokenState::Consumed => steps::end_reused_session(tx, &rotation).await,
        TokenState::Dead => Ok(RotationOutcome::Invalid),
    }
}

/// Replaces the presented token by the next one, if it is the live token of an open session.
async fn rotate(
    executor: impl Executor<'_, Database = Postgres>,
    rotation: &Rotation,
) -> Result<Option<User>, StoreError> {
    sqlx::query_as::<_, UserRow>(concat!(
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
    .bind(Stamp(rotation.next.issue_time))
    .bind(Stamp(rotation.next.expire_time))
    .bind(Stamp(rotation.context.now))
    .bind(rotation.next.user_id.0)
    .fetch_optional(executor)
    .await?
    .map(UserRow::into_user)
    .transpose()
}
