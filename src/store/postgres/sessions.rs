//! The steps of sessions and password attempts, in PostgreSQL's dialect, and the log of revocations.
//!
//! A step that runs on every login, refresh or logout is one statement outside a transaction. A statement that the
//! client abandons is complete or never happened, and it costs one round trip. Where one statement cannot see what it
//! has waited for, a transaction follows.

use std::time::{Duration, Instant};

use async_trait::async_trait;
use sqlx::{FromRow as _, Row as _, postgres::PgRow};

use crate::{
    domain::{
        account::Email,
        audit::{Action, AuditContext},
        ids::{SessionId, UserId},
        ports::{
            ATTEMPT_LIFETIME, LoginAttempt, LoginStart, Logout, LogoutOutcome, NewSession, REVOCATIONS_AT_ONCE,
            Reservation, Revocation, Rotation, RotationOutcome, SessionOpening, SessionStore, SurplusSessions,
        },
        refresh::TokenState,
        seen::SeenGeneration,
        session::RevokeReason,
        throttle::AttemptSubject,
    },
    error::StoreError,
    store::{
        rows::{CredentialsRow, LogoutTargetRow, RevocationRow, StoredSessionRow, UserRow, user_columns},
        shared::{Stamp, run_to_completion},
        statement::Statement,
        steps::{self, Backend as _, WriteTransaction as _, bind_session},
    },
};

use super::{
    PostgresStore,
    pool::Purpose,
    transaction::{REVOCATIONS, Tx, forget_time},
};

/// Whether what is stored about the attempts still counts. What a clock wrote that was ahead does not.
macro_rules! counts {
    () => {
        "a.forget_time > clock_timestamp() \
         AND a.forget_time <= clock_timestamp() + make_interval(secs => greatest($3, $4))"
    };
}

/// Whether the attempts under way may still be settled.
macro_rules! is_under_way {
    () => {
        "a.under_way_until > clock_timestamp() \
         AND a.under_way_until <= clock_timestamp() + make_interval(secs => $4)"
    };
}

/// Reserves an attempt, as `attempt`: no row if it is refused. `$1` subject, `$2` failures allowed without a pause,
/// `$3` seconds that failures count, `$4` seconds after which an attempt that nobody settled is forgotten.
///
/// Time is the database's, since the clock of a replica may be wrong. Of several attempts at the same time each counts
/// those before it, because they wait for the row.
macro_rules! reserve_attempt {
    () => {
        concat!(
            "WITH attempt AS (\
             INSERT INTO login_attempts AS a (subject, failures, blocked_until, forget_time, under_way, under_way_until) \
             VALUES ($1, 0, 'epoch', clock_timestamp() + make_interval(secs => $3), \
             1, clock_timestamp() + make_interval(secs => $4)) \
             ON CONFLICT (subject) DO UPDATE SET failures = CASE WHEN ",
            counts!(),
            " THEN a.failures ELSE 0 END, blocked_until = CASE WHEN ",
            counts!(),
            " THEN a.blocked_until ELSE 'epoch' END, under_way = CASE WHEN ",
            is_under_way!(),
            " THEN a.under_way + 1 ELSE 1 END, under_way_until = clock_timestamp() + make_interval(secs => $4), \
             forget_time = greatest(CASE WHEN ",
            counts!(),
            " THEN a.forget_time END, clock_timestamp() + make_interval(secs => $4)) WHERE NOT (",
            counts!(),
            ") OR a.blocked_until <= clock_timestamp() AND (NOT (",
            is_under_way!(),
            ") OR a.under_way = 0 OR a.failures + a.under_way < $2) RETURNING 1) "
        )
    };
}

/// One row for the statement that reserves, which makes its commit wait for no disk: if the database crashes, the
/// attempts under way are lost with the calls that made them.
macro_rules! relaxed {
    () => {
        " FROM (SELECT set_config('synchronous_commit', 'off', true)) AS relaxed"
    };
}

/// The columns of a reservation.
macro_rules! reservation_columns {
    () => {
        "EXISTS (SELECT FROM attempt) AS reserved, (SELECT extract(epoch FROM blocked_until - clock_timestamp())::float8 \
         FROM login_attempts WHERE subject = $1) AS blocked_for"
    };
}

/// Opens a session. `$1` to `$10` are the values of [`bind_session`], `$11` the version of the password, `$12` the subject of
/// the attempt, `$13` the id of the audit row, `$14` its action, `$15` how many open sessions the user may have.
///
/// No row if somebody else has locked the user: then a transaction waits for them. It is needed because this statement does
/// not see what it would have waited for, such as the sessions of other logins.
const OPEN_SESSION: &str = concat!(
    "WITH account AS (SELECT ",
    user_columns!(),
    " FROM users u WHERE u.id = $2 AND u.password_version = $11 AND NOT u.disabled FOR NO KEY UPDATE OF u SKIP LOCKED), \
     session AS (INSERT INTO sessions (id, user_id, create_time, end_time, generation, refresh_hash, \
     refresh_issue_time, refresh_expire_time, last_refresh_time, client_ip, user_agent) \
     SELECT $1, id, $3, $4, $5, $6, $7, $8, clock_timestamp(), $9, $10 FROM account), \
     forgiven AS (UPDATE login_attempts SET failures = 0, blocked_until = 'epoch', \
     under_way = greatest(under_way - 1, 0), forget_time = under_way_until \
     WHERE subject = $12 AND EXISTS (SELECT FROM account)), \
     audited AS (INSERT INTO audit_events (id, create_time, action, actor_id, user_id, session_id, client_ip) \
     SELECT $13, $3, $14, id, id, $1, $9 FROM account) \
     SELECT *, (SELECT count(*) FROM (SELECT FROM sessions WHERE user_id = $2 AND revoke_time IS NULL \
     AND refresh_expire_time > $3 LIMIT $15) AS open) >= $15 AS too_many FROM account"
);

/// The entries of the log with numbers `$2`, and the next `$3` after number `$1`. The first row is none of them: it has
/// whether the database takes no writes, and its time. Both are needed about as often as the log.
///
/// With OR instead of UNION ALL, PostgreSQL may walk the whole log.
const REVOCATIONS_AND_STATE: &str = "SELECT number, session_id, user_id, roles, revoke_time, forget_time FROM revocations \
     WHERE number = ANY($2) AND number > 0 UNION ALL (SELECT number, session_id, user_id, roles, revoke_time, forget_time \
     FROM revocations WHERE number > $1 ORDER BY number LIMIT $3) \
     UNION ALL SELECT -1, NULL, NULL, current_setting('transaction_read_only'), NULL, clock_timestamp() ORDER BY number";

/// Replaces the presented token by the next one, if it is the live token of an open session.
const ROTATE: &str = concat!(
    "UPDATE sessions s SET generation = $4, refresh_hash = $5, refresh_issue_time = $6, ",
    "refresh_expire_time = $7, last_refresh_time = clock_timestamp(), ",
    "newest_token_time = greatest(s.newest_token_time, s.refresh_issue_time, $6) FROM users u ",
    "WHERE s.id = $1 AND s.user_id = $9 AND s.generation = $2 AND s.refresh_hash = $3 AND s.revoke_time IS NULL ",
    "AND s.refresh_expire_time > $8 AND u.id = s.user_id AND NOT u.disabled RETURNING ",
    user_columns!()
);

/// Writes the generations in `$1`, a JSON array of pairs. Returns the sessions whose rows are locked, or null if there are none.
/// The rows are found by their place, since they were just looked up, and nobody can move them while they are locked. The
/// commit waits for no disk, as in [`relaxed!`].
const WRITE_SEEN: &str = "WITH seen AS MATERIALIZED (SELECT (pair ->> 0)::uuid AS id, (pair ->> 1)::int8 AS generation \
     FROM json_array_elements($1::json) AS pair), \
     free AS (SELECT s.ctid AS place, seen.generation FROM sessions s JOIN seen USING (id) \
     WHERE s.seen_generation < seen.generation FOR NO KEY UPDATE OF s SKIP LOCKED), \
     written AS (UPDATE sessions s SET seen_generation = free.generation FROM free WHERE s.ctid = free.place RETURNING 1) \
     SELECT CASE WHEN (SELECT count(*) FROM written) < (SELECT count(*) FROM seen) \
     THEN array(SELECT s.id FROM sessions s JOIN seen USING (id) WHERE s.seen_generation < seen.generation \
     AND s.ctid NOT IN (SELECT place FROM free)) END AS locked, set_config('synchronous_commit', 'off', true)";

/// Ends session `$1` of user `$2`, with its revocation and its audit row if it has not ended before. A token older than
/// the previous one is a reused one: `$10` is the presented generation, `$11` and `$12` the reason and the action then.
/// Returns whether the session exists. The rule is that of `LogoutTarget::decide`.
const LOGOUT: &str = concat!(
    "WITH ended AS (UPDATE sessions SET revoke_time = $3, \
     revoke_reason = CASE WHEN $10 >= generation - 1 THEN $4 ELSE $11 END \
     WHERE id = $1 AND user_id = $2 AND revoke_time IS NULL \
     RETURNING id, refresh_issue_time, newest_token_time, $10 >= generation - 1 AS is_newest), \
     logged AS (INSERT INTO revocations (session_id, revoke_time, forget_time) SELECT id, $3, ",
    forget_time!("$3", "$5", "refresh_issue_time", "newest_token_time"),
    " FROM ended), \
     audited AS (INSERT INTO audit_events (id, create_time, action, actor_id, user_id, session_id, client_ip) \
     SELECT $6, $3, CASE WHEN is_newest THEN $7 ELSE $12 END, CASE WHEN is_newest THEN $2 END, $2, id, $8 FROM ended) \
     SELECT EXISTS (SELECT FROM sessions WHERE id = $1 AND user_id = $2) AS found, \
     (SELECT count(pg_notify($9, '')) FROM ended) AS told"
);

/// Counts a failure and writes its audit row. `$1` subject, `$2` failures allowed without a pause, `$3` and `$4` the
/// first and the longest pause in seconds, `$5` seconds that failures count; `$6` to `$10` the audit row.
const ATTEMPT_FAILED: &str = "WITH counted AS (\
     INSERT INTO login_attempts AS a (subject, failures, blocked_until, forget_time) \
     VALUES ($1, 1, clock_timestamp() + make_interval(secs => CASE WHEN $2 <= 1 THEN $3 ELSE 0 END), \
     clock_timestamp() + make_interval(secs => $5)) \
     ON CONFLICT (subject) DO UPDATE SET failures = a.failures + 1, under_way = greatest(a.under_way - 1, 0), \
     blocked_until = clock_timestamp() + make_interval(secs => CASE WHEN a.failures + 1 < $2 THEN 0 \
     ELSE least($4, $3 * power(2, least(a.failures + 1 - $2, 30))) END), \
     forget_time = clock_timestamp() + make_interval(secs => $5)) \
     INSERT INTO audit_events (id, create_time, action, actor_id, user_id, client_ip) VALUES ($6, $7, $8, $9, $10, $11)";

#[async_trait]
impl SessionStore for PostgresStore {
    async fn start_login(&self, attempt: LoginAttempt, email: &Email) -> Result<LoginStart, StoreError> {
        let statement = bind_attempt(
            Statement::new(concat!(
                reserve_attempt!(),
                "SELECT ",
                reservation_columns!(),
                ", ",
                user_columns!(),
                ", u.password_hash, u.password_version",
                relaxed!(),
                " LEFT JOIN users u ON u.email = $5"
            )),
            attempt,
        )
        .bind(email.as_str());
        let row = self.written_row(statement).await?;
        let reservation = reservation(&row)?;
        let found = row.try_get::<Option<uuid::Uuid>, _>("id")?.is_some();
        let account = if found { Some(CredentialsRow::from_row(&row)?.into_credentials()?) } else { None };
        Ok(match reservation {
            Reservation::Reserved => LoginStart::Reserved(account),
            Reservation::Busy => LoginStart::Busy,
            Reservation::Blocked { retry_after } => LoginStart::Blocked { retry_after },
        })
    }

    async fn reserve_attempt(&self, attempt: LoginAttempt) -> Result<Reservation, StoreError> {
        let statement = Statement::new(concat!(reserve_attempt!(), "SELECT ", reservation_columns!(), relaxed!()));
        reservation(&self.written_row(bind_attempt(statement, attempt)).await?)
    }

    async fn attempt_succeeded(&self, subject: AttemptSubject) -> Result<(), StoreError> {
        self.execute(steps::forgive_attempts(subject)).await.map(drop)
    }

    async fn attempt_abandoned(&self, subject: AttemptSubject) -> Result<(), StoreError> {
        self.execute(steps::abandon_attempt(subject)).await.map(drop)
    }

    async fn attempt_failed(
        &self,
        attempt: LoginAttempt,
        user: Option<UserId>,
        context: AuditContext,
    ) -> Result<(), StoreError> {
        let statement = Statement::new(ATTEMPT_FAILED)
            .bind(attempt.subject.0)
            .bind(attempt.policy.max_failures)
            .bind(attempt.policy.first_delay.as_secs_f64())
            .bind(attempt.policy.longest_delay.as_secs_f64())
            .bind(attempt.policy.window.as_secs_f64())
            .bind(context.event.0)
            .bind(context.now)
            .bind(Action::LoginFailed.as_str())
            .bind(context.actor.map(|actor| actor.0))
            .bind(user.map(|user| user.0))
            .bind(context.client_ip.map(|ip| ip.to_string()));
        self.execute(statement).await.map(drop)
    }

    async fn open_session(&self, session: NewSession) -> Result<SessionOpening, StoreError> {
        if session.rehash.is_some() {
            return steps::write(self, |tx| steps::open_session(tx, session)).await;
        }
        let (context, version) = (session.context, session.password_version);
        let (attempt, most) = (session.attempt, session.most);
        let statement = bind_session(Statement::new(OPEN_SESSION), session.clone())
            .bind(version)
            .bind(attempt.map(|subject| subject.0))
            .bind(context.event.0)
            .bind(Action::Login.as_str())
            .bind(i64::from(most));
        let Some(row) = self.all_rows(Purpose::Write, statement).await?.pop() else {
            return steps::write(self, |tx| steps::open_session(tx, session)).await;
        };
        let user = UserRow::from_row(&row)?.into_user()?;
        let too_many = row.try_get("too_many")?;
        Ok(if too_many { SessionOpening::OpenedTooMany(user) } else { SessionOpening::Opened(user) })
    }

    async fn end_surplus_sessions(&self, surplus: SurplusSessions) -> Result<bool, StoreError> {
        steps::write(self, |tx| steps::end_surplus_sessions(tx, surplus)).await
    }

    async fn rotate_refresh(&self, rotation: Rotation) -> Result<RotationOutcome, StoreError> {
        // Nearly every refresh ends here. Of several that present the same generation, the first takes the row; the
        // others wait for it and then find another generation.
        match self.written::<UserRow>(rotate(&rotation)).await? {
            Some(user) => Ok(RotationOutcome::Rotated(user.into_user()?)),
            None => steps::write(self, |tx| classify(tx, rotation)).await,
        }
    }

    async fn write_seen(&self, seen: &[SeenGeneration]) -> Result<Vec<SessionId>, StoreError> {
        let pairs: Vec<_> = seen.iter().map(|seen| (seen.session.to_string(), seen.generation)).collect();
        let pairs = serde_json::to_string(&pairs).map_err(StoreError::broken)?;
        let row = self.written_row(Statement::new(WRITE_SEEN).bind(pairs.as_str())).await?;
        let locked: Option<Vec<uuid::Uuid>> = row.try_get("locked")?;
        Ok(locked.unwrap_or_default().into_iter().map(SessionId).collect())
    }

    async fn logout(&self, logout: Logout) -> Result<LogoutOutcome, StoreError> {
        if logout.everywhere {
            // One statement would not see the session of a login that it has waited for.
            return steps::write(self, |tx| logout_everywhere(tx, logout)).await;
        }
        let context = logout.context;
        let statement = Statement::new(LOGOUT)
            .bind(logout.session_id.0)
            .bind(logout.user_id.0)
            .bind(context.now)
            .bind(RevokeReason::Logout.as_str())
            .bind(context.retain_until)
            .bind(context.event.0)
            .bind(RevokeReason::Logout.action().as_str())
            .bind(context.client_ip.map(|ip| ip.to_string()))
            .bind(REVOCATIONS)
            .bind(logout.presented_generation)
            .bind(RevokeReason::TokenReused.as_str())
            .bind(RevokeReason::TokenReused.action().as_str());
        let found: bool = self.written_row(statement).await?.try_get("found")?;
        Ok(if found { LogoutOutcome::LoggedOut } else { LogoutOutcome::Refused })
    }

    async fn revocations(&self, after: i64, wanted: &[i64]) -> Result<Vec<Revocation>, StoreError> {
        let store = self.clone();
        let wanted = wanted.to_vec();
        run_to_completion(async move {
            let mut connection = store.connection(Purpose::Read).await?;
            let asked_at = Instant::now();
            let query =
                sqlx::query(REVOCATIONS_AND_STATE).bind(after).bind(wanted).bind(i64::from(REVOCATIONS_AT_ONCE));
            let rows = query.fetch_all(connection.get()?).await;
            let rows = match rows {
                Ok(rows) if takes_no_writes(rows.first())? => {
                    drop(connection); // closed
                    store.found_read_only();
                    rows
                }
                rows => connection.give_back_after(rows)?,
            };
            let Some((state, entries)) = rows.split_first() else {
                return Err(StoreError::broken("a statement returned no row"));
            };
            store.clock.set(state.try_get::<Stamp, _>("forget_time")?.0, asked_at.elapsed());
            entries.iter().map(|row| RevocationRow::from_row(row)?.into_revocation()).collect()
        })
        .await
    }

    async fn revocation_written(&self) {
        self.revocation_written.notified().await;
    }
}

/// Reads the first row of [`REVOCATIONS_AND_STATE`].
fn takes_no_writes(state: Option<&PgRow>) -> Result<bool, StoreError> {
    Ok(state.map(|row| row.try_get::<String, _>("roles")).transpose()?.is_some_and(|setting| setting == "on"))
}

/// The values of [`reserve_attempt!`].
fn bind_attempt(statement: Statement, attempt: LoginAttempt) -> Statement {
    statement
        .bind(attempt.subject.0)
        .bind(attempt.policy.max_failures)
        .bind(attempt.policy.window.as_secs_f64())
        .bind(ATTEMPT_LIFETIME.as_secs_f64())
}

/// Reads [`reservation_columns!`].
fn reservation(row: &PgRow) -> Result<Reservation, StoreError> {
    if row.try_get("reserved")? {
        return Ok(Reservation::Reserved);
    }
    let blocked_for: Option<f64> = row.try_get("blocked_for")?;
    let retry_after = Duration::try_from_secs_f64(blocked_for.unwrap_or_default()).unwrap_or_default();
    // The pause was read as it was before the statement: another attempt may have started or ended it meanwhile.
    Ok(if retry_after.is_zero() { Reservation::Busy } else { Reservation::Blocked { retry_after } })
}

/// Ends every session of the user of a token that was presented to log out, if the rules say so.
async fn logout_everywhere(mut tx: Tx, logout: Logout) -> Result<LogoutOutcome, StoreError> {
    // The user is locked before the sessions: a login that holds the user's row commits first, and its session is among
    // those that end.
    tx.run(Statement::new("SELECT id FROM users WHERE id = $1 FOR NO KEY UPDATE").bind(logout.user_id.0)).await?;
    let target = Statement::new(
        "SELECT generation, refresh_expire_time, revoke_reason FROM sessions WHERE id = $1 AND user_id = $2 FOR UPDATE",
    )
    .bind(logout.session_id.0)
    .bind(logout.user_id.0);
    match tx.find::<LogoutTargetRow>(target).await? {
        Some(target) => steps::apply_logout(tx, &target.into_target(), &logout).await,
        None => Ok(LogoutOutcome::Refused),
    }
}

/// Classifies a refresh token that was not the live one a moment ago, with its session locked.
async fn classify(mut tx: Tx, rotation: Rotation) -> Result<RotationOutcome, StoreError> {
    let presented = Statement::new(concat!(
        "SELECT ",
        user_columns!(),
        ", s.generation, s.refresh_hash, s.refresh_issue_time, s.refresh_expire_time, s.revoke_time, ",
        "s.seen_generation, (extract(epoch FROM clock_timestamp() - s.last_refresh_time) * 1000000)::int8 ",
        "AS microseconds_since_rotation ",
        "FROM sessions s JOIN users u ON u.id = s.user_id WHERE s.id = $1 AND s.user_id = $2 FOR UPDATE OF s"
    ))
    .bind(rotation.next.session_id.0)
    .bind(rotation.next.user_id.0);
    let Some(session) = tx.find::<StoredSessionRow>(presented).await? else {
        return Ok(RotationOutcome::Invalid);
    };
    let session = session.into_session()?;
    match session.state.classify(&rotation) {
        // The user was disabled a moment ago and has been enabled since.
        TokenState::Current => {
            let rotated = tx.find_user(rotate(&rotation)).await?;
            tx.commit().await?;
            Ok(rotated.map_or(RotationOutcome::Invalid, RotationOutcome::Rotated))
        }
        TokenState::Newer => {
            tx.run(carry_on(&rotation)).await?;
            steps::carried_on(tx, session, &rotation).await
        }
        TokenState::Previous => Ok(steps::replayed(session, &rotation)),
        TokenState::Consumed => steps::end_reused_session(tx, &rotation).await,
        TokenState::Dead => Ok(RotationOutcome::Invalid),
    }
}

/// Continues a session from a token that its row does not know yet. The caller has locked the row.
fn carry_on(rotation: &Rotation) -> Statement {
    Statement::new(
        "UPDATE sessions SET generation = $2, refresh_hash = $3, refresh_issue_time = $4, refresh_expire_time = $5, \
         last_refresh_time = clock_timestamp(), newest_token_time = greatest(newest_token_time, refresh_issue_time, $4) \
         WHERE id = $1",
    )
    .bind(rotation.next.session_id.0)
    .bind(rotation.next.generation)
    .bind(rotation.next_hash.0)
    .bind(rotation.next.issue_time)
    .bind(rotation.next.expire_time)
}

/// Replaces the presented token by the next one, if it is the live token of an open session.
fn rotate(rotation: &Rotation) -> Statement {
    Statement::new(ROTATE)
        .bind(rotation.next.session_id.0)
        .bind(rotation.presented_generation)
        .bind(rotation.presented_hash.0)
        .bind(rotation.next.generation)
        .bind(rotation.next_hash.0)
        .bind(rotation.next.issue_time)
        .bind(rotation.next.expire_time)
        .bind(rotation.context.now)
        .bind(rotation.next.user_id.0)
}
