//! The steps of sessions and password attempts, in SQLite's dialect, and the log of revocations.

use std::time::Duration;

use async_trait::async_trait;

use crate::{
    domain::{
        account::Email,
        audit::{Action, AuditContext, AuditTarget},
        ids::{SessionId, UserId},
        ports::{
            ATTEMPT_LIFETIME, LoginAttempt, LoginStart, Logout, LogoutOutcome, NewSession, Queries as _,
            REVOCATIONS_AT_ONCE, Reservation, Revocation, Rotation, RotationOutcome, SessionOpening, SessionStore,
            SurplusSessions,
        },
        refresh::TokenState,
        seen::SeenGeneration,
        throttle::{AttemptCount, AttemptSubject},
    },
    error::StoreError,
    store::{
        rows::{LogoutTargetRow, RevocationRow, StoredSessionRow, user_columns},
        shared::{Stamp, microseconds, span},
        statement::Statement,
        steps::{self, Backend as _, WriteTransaction as _},
    },
};

use super::{SqliteStore, transaction::Tx};

#[async_trait]
impl SessionStore for SqliteStore {
    async fn open_session(&self, session: NewSession) -> Result<SessionOpening, StoreError> {
        steps::write(self, |tx| steps::open_session(tx, session)).await
    }

    async fn end_surplus_sessions(&self, surplus: SurplusSessions) -> Result<bool, StoreError> {
        steps::write(self, |tx| steps::end_surplus_sessions(tx, surplus)).await
    }

    async fn rotate_refresh(&self, rotation: Rotation) -> Result<RotationOutcome, StoreError> {
        steps::write(self, |tx| classify(tx, rotation)).await
    }

    async fn write_seen(&self, seen: &[SeenGeneration]) -> Result<Vec<SessionId>, StoreError> {
        let pairs: Vec<_> = seen.iter().map(|seen| (seen.session.0.simple().to_string(), seen.generation)).collect();
        let pairs = serde_json::to_string(&pairs).map_err(StoreError::broken)?;
        let statement = Statement::new(
            "UPDATE sessions SET seen_generation = seen.generation FROM (SELECT unhex(value ->> 0) AS id, \
             value ->> 1 AS generation FROM json_each($1)) AS seen \
             WHERE sessions.id = seen.id AND sessions.seen_generation < seen.generation",
        );
        self.execute(statement.bind(pairs.as_str())).await?;
        Ok(Vec::new())
    }

    async fn logout(&self, logout: Logout) -> Result<LogoutOutcome, StoreError> {
        steps::write(self, |mut tx| async move {
            let target = sqlx::query_as::<_, LogoutTargetRow>(
                "SELECT generation, refresh_expire_time, revoke_reason FROM sessions WHERE id = $1 AND user_id = $2",
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

    async fn start_login(&self, attempt: LoginAttempt, email: &Email) -> Result<LoginStart, StoreError> {
        Ok(match self.reserve_attempt(attempt).await? {
            Reservation::Reserved => LoginStart::Reserved(self.credentials(email).await?),
            Reservation::Blocked { retry_after } => LoginStart::Blocked { retry_after },
            Reservation::Busy => LoginStart::Busy,
        })
    }

    async fn reserve_attempt(&self, attempt: LoginAttempt) -> Result<Reservation, StoreError> {
        steps::write(self, move |mut tx| async move {
            let now = microseconds(attempt.now);
            let before = attempts(&mut tx, attempt).await?;
            if before.blocked_until > now {
                let retry_after = Duration::from_micros(before.blocked_until.abs_diff(now));
                return Ok(Reservation::Blocked { retry_after });
            }
            if !before.count.allows_another(&attempt.policy) {
                return Ok(Reservation::Busy);
            }
            let settled_by = now + span(ATTEMPT_LIFETIME);
            let statement = Statement::new(
                "INSERT INTO login_attempts (subject, failures, blocked_until, forget_time, under_way, under_way_until) \
                 VALUES ($1, $2, 0, $3, $4, $5) ON CONFLICT (subject) DO UPDATE SET failures = $2, blocked_until = 0, \
                 forget_time = $3, under_way = $4, under_way_until = $5",
            )
            .bind(attempt.subject.0)
            .bind(before.count.failures)
            .bind(settled_by.max(before.forget_time))
            .bind(before.count.under_way + 1)
            .bind(settled_by);
            tx.run(statement).await?;
            tx.commit().await?;
            Ok(Reservation::Reserved)
        })
        .await
    }

    async fn attempt_succeeded(&self, subject: AttemptSubject) -> Result<(), StoreError> {
        steps::write(self, move |mut tx| async move {
            tx.run(steps::forgive_attempts(subject)).await?;
            tx.commit().await
        })
        .await
    }

    async fn attempt_abandoned(&self, subject: AttemptSubject) -> Result<(), StoreError> {
        steps::write(self, move |mut tx| async move {
            tx.run(steps::abandon_attempt(subject)).await?;
            tx.commit().await
        })
        .await
    }

    async fn attempt_failed(
        &self,
        attempt: LoginAttempt,
        user: Option<UserId>,
        context: AuditContext,
    ) -> Result<(), StoreError> {
        steps::write(self, move |mut tx| async move {
            let now = microseconds(attempt.now);
            let before = attempts(&mut tx, attempt).await?;
            let failures = before.count.failures + 1;
            let statement = Statement::new(
                "INSERT INTO login_attempts (subject, failures, blocked_until, forget_time) VALUES ($1, $2, $3, $4) \
                 ON CONFLICT (subject) DO UPDATE SET failures = $2, blocked_until = $3, forget_time = $4, \
                 under_way = max(under_way - 1, 0)",
            )
            .bind(attempt.subject.0)
            .bind(failures)
            .bind(now + span(attempt.policy.delay_after(failures)))
            .bind(now + span(attempt.policy.window));
            tx.run(statement).await?;
            tx.record(Action::LoginFailed, &context, AuditTarget { user, ..AuditTarget::default() }).await?;
            tx.commit().await
        })
        .await
    }

    async fn revocations(&self, after: i64, wanted: &[i64]) -> Result<Vec<Revocation>, StoreError> {
        sqlx::query_as::<_, RevocationRow>(
            "SELECT number, session_id, user_id, roles, revoke_time, forget_time FROM revocations \
             WHERE number IN (SELECT value FROM json_each($3)) \
             UNION ALL SELECT * FROM (SELECT number, session_id, user_id, roles, revoke_time, forget_time FROM revocations \
             WHERE number > $1 ORDER BY number LIMIT $2) ORDER BY number",
        )
        .bind(after)
        .bind(i64::from(REVOCATIONS_AT_ONCE))
        .bind(serde_json::to_string(wanted).map_err(StoreError::broken)?)
        .fetch_all(&self.readers)
        .await?
        .into_iter()
        .map(RevocationRow::into_revocation)
        .collect()
    }

    async fn revocation_written(&self) {
        // There is one serving process, which reads its own entries before it answers. Polling finds what the command
        // line has written.
        std::future::pending::<()>().await;
    }
}

/// The attempts at an account's password that still count.
struct Attempts {
    count: AttemptCount,
    blocked_until: i64,
    forget_time: i64,
}

async fn attempts(tx: &mut Tx, attempt: LoginAttempt) -> Result<Attempts, StoreError> {
    let now = microseconds(attempt.now);
    let row: Option<(i64, i64, i64, i64, i64)> = sqlx::query_as(
        "SELECT failures, blocked_until, forget_time, under_way, under_way_until FROM login_attempts WHERE subject = $1",
    )
    .bind(attempt.subject.0.as_slice())
    .fetch_optional(&mut *tx.sql)
    .await?;
    // What a clock wrote that was ahead does not count: a pause is never longer than its maximum.
    let longest = span(attempt.policy.window.max(ATTEMPT_LIFETIME));
    let counts = |until: i64, longest: i64| until > now && until <= now.saturating_add(longest);
    Ok(match row {
        Some((failures, blocked_until, forget_time, under_way, under_way_until)) if counts(forget_time, longest) => {
            let is_under_way = counts(under_way_until, span(ATTEMPT_LIFETIME));
            Attempts {
                count: AttemptCount { failures, under_way: if is_under_way { under_way } else { 0 } },
                blocked_until,
                forget_time,
            }
        }
        Some(_) | None => {
            let forget_time = now + span(attempt.policy.window);
            Attempts { count: AttemptCount { failures: 0, under_way: 0 }, blocked_until: 0, forget_time }
        }
    })
}

async fn classify(mut tx: Tx, rotation: Rotation) -> Result<RotationOutcome, StoreError> {
    let session = sqlx::query_as::<_, StoredSessionRow>(concat!(
        "SELECT ",
        user_columns!(),
        ", s.generation, s.refresh_hash, s.refresh_issue_time, s.refresh_expire_time, s.revoke_time, ",
        "s.seen_generation, $3 - s.last_refresh_time AS microseconds_since_rotation ",
        "FROM sessions s JOIN users u ON u.id = s.user_id WHERE s.id = $1 AND s.user_id = $2"
    ))
    .bind(rotation.next.session_id.0)
    .bind(rotation.next.user_id.0)
    .bind(Stamp(rotation.context.now))
    .fetch_optional(&mut *tx.sql)
    .await?;
    let Some(session) = session else {
        return Ok(RotationOutcome::Invalid);
    };
    let session = session.into_session()?;
    match session.state.classify(&rotation) {
        TokenState::Current => {
            rotate(&mut tx, &rotation).await?;
            tx.commit().await?;
            Ok(RotationOutcome::Rotated(session.user))
        }
        TokenState::Newer => {
            rotate(&mut tx, &rotation).await?;
            steps::carried_on(tx, session, &rotation).await
        }
        TokenState::Previous => Ok(steps::replayed(session, &rotation)),
        TokenState::Consumed => steps::end_reused_session(tx, &rotation).await,
        TokenState::Dead => Ok(RotationOutcome::Invalid),
    }
}

/// Replaces the presented token, which was found to be the live one or a newer one, by the next one.
async fn rotate(tx: &mut Tx, rotation: &Rotation) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE sessions SET generation = $2, refresh_hash = $3, refresh_issue_time = $4, refresh_expire_time = $5, \
         last_refresh_time = $6, newest_token_time = max(coalesce(newest_token_time, 0), refresh_issue_time, $4) \
         WHERE id = $1",
    )
    .bind(rotation.next.session_id.0)
    .bind(rotation.next.generation)
    .bind(rotation.next_hash.0.as_slice())
    .bind(Stamp(rotation.next.issue_time))
    .bind(Stamp(rotation.next.expire_time))
    .bind(Stamp(rotation.context.now))
    .execute(&mut *tx.sql)
    .await?;
    Ok(())
}
