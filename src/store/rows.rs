//! Rows as the database returns them, and the domain values that they become. A row that cannot be read names its
//! column.

use std::time::Duration;

use sqlx::{FromRow, Row as _, postgres::PgRow, sqlite::SqliteRow};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    domain::{
        account::{Email, User, Username},
        audit::AuditEvent,
        ids::{ActorId, AuditEventId, MailId, ServiceAccountId, ServiceKeyId, SessionId, UserId},
        mail::{MailKind, NewMail},
        one_time::{OneTimeGrant, Purpose},
        password::PasswordHash,
        ports::{ClaimedMail, Credentials, MailQueue, OneTimeToken, Revocation, Revoked, SealedSigningKey},
        refresh::{LogoutTarget, StoredSession},
        role::Role,
        service_account::{SecretHash, ServiceAccount, ServiceKey, ServiceName},
        session::{RefreshHash, RevokeReason, SessionSummary},
    },
    error::StoreError,
    trace::TraceParent,
};

use super::shared::Stamp;

/// The columns of [`UserRow`], of a table `users u`. `string_agg` and its `ORDER BY` are the same in both dialects.
macro_rules! user_columns {
    () => {
        "u.id, u.username, u.email, u.email_verified, u.disabled, u.create_time, u.update_time, \
         coalesce((SELECT string_agg(r.role, ' ' ORDER BY r.role) FROM user_roles r WHERE r.user_id = u.id), '') AS roles"
    };
}
pub(super) use user_columns;

/// The newest `$1` audit rows with ids before `$2` for which a condition holds too.
macro_rules! audit_events {
    ($condition:literal) => {
        concat!(
            "SELECT id, create_time, action, actor_id, user_id, session_id, client_ip, detail FROM audit_events WHERE id < $2",
            $condition,
            " ORDER BY id DESC LIMIT $1"
        )
    };
}
pub(super) use audit_events;

/// The columns of [`ServiceRow`], of a table `service_accounts a`.
macro_rules! service_columns {
    () => {
        "a.id AS service_id, a.name, a.roles AS service_roles, a.disabled AS service_disabled, \
         a.create_time AS service_create_time, a.update_time AS service_update_time"
    };
}
pub(super) use service_columns;

/// The columns of [`ServiceKeyRow`], of a table `service_keys k`.
macro_rules! service_key_columns {
    () => {
        "k.id AS key_id, k.service_account_id, k.description, k.create_time AS key_create_time, k.expire_time, \
         k.last_use_time"
    };
}
pub(super) use service_key_columns;

/// The service account with id `$1`.
pub(super) const SERVICE_BY_ID: &str =
    concat!("SELECT ", service_columns!(), " FROM service_accounts a WHERE a.id = $1");

/// In the log of revocations: enabled, and without any role. An empty text means that all tokens are refused.
pub(super) const NO_ROLES: &str = " ";

/// The account with id `$1`. The same in both dialects, as are the next ones.
pub(super) const USER_BY_ID: &str = concat!("SELECT ", user_columns!(), " FROM users u WHERE u.id = $1");

/// The account with address `$1`.
pub(super) const USER_BY_EMAIL: &str = concat!("SELECT ", user_columns!(), " FROM users u WHERE u.email = $1");

/// The user of a live session: session `$1` of user `$2`.
pub(super) const USER_OF_SESSION: &str = concat!(
    "SELECT ",
    user_columns!(),
    " FROM users u JOIN sessions s ON s.user_id = u.id ",
    "WHERE s.id = $1 AND u.id = $2 AND s.revoke_time IS NULL AND NOT u.disabled"
);

/// The same with the password hash.
pub(super) const CREDENTIALS_OF_SESSION: &str = concat!(
    "SELECT ",
    user_columns!(),
    ", u.password_hash, u.password_version FROM users u JOIN sessions s ON s.user_id = u.id ",
    "WHERE s.id = $1 AND u.id = $2 AND s.revoke_time IS NULL AND NOT u.disabled"
);

/// The end of the range of texts that start with a prefix: U+10FFFF sorts after every other character.
pub(super) fn end_of_prefix(prefix: &str) -> String {
    format!("{prefix}\u{10ffff}")
}

/// A row that can be read from every database.
pub(super) trait StoredRow: for<'r> FromRow<'r, PgRow> + for<'r> FromRow<'r, SqliteRow> + Send + Unpin {}
impl<R> StoredRow for R where R: for<'r> FromRow<'r, PgRow> + for<'r> FromRow<'r, SqliteRow> + Send + Unpin {}

fn bad_column(column: &str) -> StoreError {
    StoreError::broken(format!("column {column} has a value that this version cannot read"))
}

/// Defines a row: each field has the name of its column. One that starts with `user` contains the columns of a
/// [`UserRow`] too.
macro_rules! row {
    ($(#[$attribute:meta])* $name:ident { user, $($field:ident: $type:ty),+ $(,)? }) => {
        row!(@ $(#[$attribute])* $name { $($field: $type),+ } user);
    };
    ($(#[$attribute:meta])* $name:ident { $($field:ident: $type:ty),+ $(,)? }) => {
        row!(@ $(#[$attribute])* $name { $($field: $type),+ });
    };
    (@ $(#[$attribute:meta])* $name:ident { $($field:ident: $type:ty),+ } $($user:ident)?) => {
        $(#[$attribute])*
        pub(super) struct $name {
            $($user: UserRow,)?
            $($field: $type,)+
        }
        row!(@from PgRow, $name { $($field),+ } $($user)?);
        row!(@from SqliteRow, $name { $($field),+ } $($user)?);
    };
    (@from $row:ty, $name:ident { $($field:ident),+ } $($user:ident)?) => {
        impl FromRow<'_, $row> for $name {
            fn from_row(row: &$row) -> Result<Self, sqlx::Error> {
                Ok(Self {
                    $($user: UserRow::from_row(row)?,)?
                    $($field: row.try_get(stringify!($field))?,)+
                })
            }
        }
    };
}

row! {
    UserRow {
        id: Uuid,
        username: String,
        email: String,
        email_verified: bool,
        disabled: bool,
        create_time: Stamp,
        update_time: Stamp,
        roles: String,
    }
}

impl UserRow {
    pub(super) fn into_user(self) -> Result<User, StoreError> {
        Ok(User {
            id: UserId(self.id),
            username: Username::parse(&self.username).map_err(|_| bad_column("users.username"))?,
            email: Email::parse(&self.email).map_err(|_| bad_column("users.email"))?,
            email_verified: self.email_verified,
            roles: read_roles(&self.roles)?,
            disabled: self.disabled,
            create_time: self.create_time.0,
            update_time: self.update_time.0,
        })
    }
}

/// Roles as one text, separated by spaces.
pub(super) fn roles_text(roles: &[Role]) -> String {
    roles.iter().map(Role::as_str).collect::<Vec<_>>().join(" ")
}

/// Sorted here, because the order that the database returns depends on its collation.
fn read_roles(text: &str) -> Result<Vec<Role>, StoreError> {
    let roles = text.split_whitespace().map(|name| Role::parse(name).ok_or_else(|| bad_column("role")));
    let mut roles: Vec<_> = roles.collect::<Result<_, _>>()?;
    roles.sort();
    Ok(roles)
}

row! {
    CredentialsRow {
        user,
        password_hash: String,
        password_version: i64,
    }
}

impl CredentialsRow {
    pub(super) fn into_credentials(self) -> Result<Credentials, StoreError> {
        Ok(Credentials {
            user: self.user.into_user()?,
            password_hash: PasswordHash::from_phc(self.password_hash),
            password_version: self.password_version,
        })
    }
}

row! {
    /// The session and the user of a presented refresh token.
    StoredSessionRow {
        user,
        generation: i64,
        refresh_hash: Vec<u8>,
        refresh_issue_time: Stamp,
        refresh_expire_time: Stamp,
        revoke_time: Option<Stamp>,
        seen_generation: i64,
        microseconds_since_rotation: i64,
    }
}

/// The session of a presented refresh token, its user, and when its live token was minted.
pub(super) struct PresentedSession {
    pub user: User,
    pub state: StoredSession,
    pub refresh_issue_time: OffsetDateTime,
}

impl StoredSessionRow {
    pub(super) fn into_session(self) -> Result<PresentedSession, StoreError> {
        let user = self.user.into_user()?;
        let state = StoredSession {
            generation: self.generation,
            refresh_hash: refresh_hash(&self.refresh_hash)?,
            refresh_expire_time: self.refresh_expire_time.0,
            revoke_time: self.revoke_time.map(|time| time.0),
            user_disabled: user.disabled,
            seen_generation: self.seen_generation,
            since_rotation: Duration::from_micros(self.microseconds_since_rotation.unsigned_abs()),
        };
        Ok(PresentedSession { user, state, refresh_issue_time: self.refresh_issue_time.0 })
    }
}

fn refresh_hash(bytes: &[u8]) -> Result<RefreshHash, StoreError> {
    bytes.try_into().map(RefreshHash).map_err(|_| bad_column("sessions.refresh_hash"))
}

row! {
    /// The session of a token that is presented to log out.
    LogoutTargetRow {
        generation: i64,
        refresh_expire_time: Stamp,
        revoke_reason: Option<String>,
    }
}

impl LogoutTargetRow {
    pub(super) fn into_target(self) -> LogoutTarget {
        LogoutTarget {
            generation: self.generation,
            refresh_expire_time: self.refresh_expire_time.0,
            revoked_by_logout_everywhere: self.revoke_reason.as_deref()
                == Some(RevokeReason::LogoutEverywhere.as_str()),
            revoked: self.revoke_reason.is_some(),
        }
    }
}

row! {
    SigningKeyRow {
        kid: String,
        algorithm: String,
        sealed_private_key: Vec<u8>,
        create_time: Stamp,
        sign_time: Option<Stamp>,
        publish_ahead_seconds: Option<i64>,
    }
}

impl SigningKeyRow {
    pub(super) fn into_key(self) -> SealedSigningKey {
        SealedSigningKey {
            kid: self.kid,
            algorithm: self.algorithm,
            sealed_private_key: self.sealed_private_key,
            create_time: self.create_time.0,
            sign_time: self.sign_time.map(|time| time.0),
            publish_ahead: self.publish_ahead_seconds.map(|seconds| Duration::from_secs(seconds.unsigned_abs())),
        }
    }
}

row! {
    /// A mail of the outbox that was just leased.
    OutboxRow {
        id: Uuid,
        kind: String,
        recipient: String,
        user_id: Option<Uuid>,
        new_email: Option<String>,
        create_time: Stamp,
        trace_parent: Option<String>,
        attempts: i64,
    }
}

/// A leased mail, and the number of the attempt to send it.
pub(super) struct LeasedMail {
    pub mail: NewMail,
    pub attempt: i64,
}

impl OutboxRow {
    pub(super) fn into_leased(self) -> Result<LeasedMail, StoreError> {
        let address = |text: &str| Email::parse(text).map_err(|_| bad_column("mail_outbox.recipient or new_email"));
        Ok(LeasedMail {
            mail: NewMail {
                id: MailId(self.id),
                kind: MailKind::parse(&self.kind).ok_or_else(|| bad_column("mail_outbox.kind"))?,
                recipient: address(&self.recipient)?,
                user_id: self.user_id.map(UserId),
                new_email: self.new_email.as_deref().map(address).transpose()?,
                create_time: self.create_time.0,
                trace: self.trace_parent.map(TraceParent),
            },
            attempt: self.attempts,
        })
    }
}

impl LeasedMail {
    /// The grant of the token in the mail, if this kind of mail carries one.
    pub(super) fn grant(&self, user: &User) -> Option<OneTimeGrant> {
        self.mail.kind.purpose().map(|purpose| OneTimeGrant {
            id: self.mail.id,
            purpose,
            user_id: user.id,
            email: self.mail.recipient.clone(),
        })
    }

    pub(super) fn claimed(self, grant: Option<OneTimeGrant>) -> ClaimedMail {
        ClaimedMail {
            id: self.mail.id,
            kind: self.mail.kind,
            recipient: self.mail.recipient,
            new_email: self.mail.new_email,
            grant,
            attempt: self.attempt,
            create_time: self.mail.create_time,
            trace: self.mail.trace,
        }
    }
}

row! {
    OneTimeTokenRow {
        user,
        token_id: Uuid,
        purpose: String,
        token_email: String,
        expire_time: Stamp,
    }
}

impl OneTimeTokenRow {
    pub(super) fn into_token(self) -> Result<OneTimeToken, StoreError> {
        let user = self.user.into_user()?;
        Ok(OneTimeToken {
            grant: OneTimeGrant {
                id: MailId(self.token_id),
                purpose: Purpose::parse(&self.purpose).ok_or_else(|| bad_column("one_time_tokens.purpose"))?,
                user_id: user.id,
                email: Email::parse(&self.token_email).map_err(|_| bad_column("one_time_tokens.email"))?,
            },
            expire_time: self.expire_time.0,
            user,
        })
    }
}

row! {
    MailQueueRow {
        waiting: i64,
        dead: i64,
    }
}

impl MailQueueRow {
    pub(super) fn into_queue(self) -> MailQueue {
        MailQueue { waiting: self.waiting.unsigned_abs(), dead: self.dead.unsigned_abs() }
    }
}

row! {
    /// A session as its owner sees it.
    SessionRow {
        id: Uuid,
        create_time: Stamp,
        last_refresh_time: Stamp,
        refresh_expire_time: Stamp,
        client_ip: Option<String>,
        user_agent: Option<String>,
    }
}

impl SessionRow {
    pub(super) fn into_summary(self) -> SessionSummary {
        SessionSummary {
            id: SessionId(self.id),
            create_time: self.create_time.0,
            last_refresh_time: self.last_refresh_time.0,
            expire_time: self.refresh_expire_time.0,
            client_ip: self.client_ip,
            user_agent: self.user_agent,
        }
    }
}

row! {
    AuditRow {
        id: Uuid,
        create_time: Stamp,
        action: String,
        actor_id: Option<Uuid>,
        user_id: Option<Uuid>,
        session_id: Option<Uuid>,
        client_ip: Option<String>,
        detail: Option<String>,
    }
}

impl AuditRow {
    pub(super) fn into_event(self) -> AuditEvent {
        AuditEvent {
            id: AuditEventId(self.id),
            create_time: self.create_time.0,
            action: self.action,
            actor: self.actor_id.map(ActorId),
            user: self.user_id.map(UserId),
            session: self.session_id.map(SessionId),
            client_ip: self.client_ip,
            detail: self.detail,
        }
    }
}

row! {
    /// An entry of the log of revocations.
    RevocationRow {
        number: i64,
        session_id: Option<Uuid>,
        user_id: Option<Uuid>,
        roles: Option<String>,
        revoke_time: Stamp,
        forget_time: Stamp,
    }
}

impl RevocationRow {
    pub(super) fn into_revocation(self) -> Result<Revocation, StoreError> {
        let what = match (self.session_id, self.user_id) {
            (Some(session), None) => Revoked::Session(SessionId(session)),
            (None, Some(user)) => {
                let roles = self.roles.unwrap_or_default();
                let roles = if roles.is_empty() { None } else { Some(read_roles(&roles)?) };
                Revoked::Roles(UserId(user), roles)
            }
            (Some(_), Some(_)) | (None, None) => return Err(bad_column("revocations.session_id or user_id")),
        };
        Ok(Revocation { number: self.number, what, revoke_time: self.revoke_time.0, retain_until: self.forget_time.0 })
    }
}

row! {
    ServiceRow {
        service_id: Uuid,
        name: String,
        service_roles: String,
        service_disabled: bool,
        service_create_time: Stamp,
        service_update_time: Stamp,
    }
}

impl ServiceRow {
    pub(super) fn into_account(self) -> Result<ServiceAccount, StoreError> {
        Ok(ServiceAccount {
            id: ServiceAccountId(self.service_id),
            name: ServiceName::parse(&self.name).map_err(|_| bad_column("service_accounts.name"))?,
            roles: read_roles(&self.service_roles)?,
            disabled: self.service_disabled,
            create_time: self.service_create_time.0,
            update_time: self.service_update_time.0,
        })
    }
}

row! {
    ServiceKeyRow {
        key_id: Uuid,
        service_account_id: Uuid,
        description: String,
        key_create_time: Stamp,
        expire_time: Option<Stamp>,
        last_use_time: Option<Stamp>,
    }
}

impl ServiceKeyRow {
    pub(super) fn into_key(self) -> ServiceKey {
        ServiceKey {
            id: ServiceKeyId(self.key_id),
            account: ServiceAccountId(self.service_account_id),
            description: self.description,
            create_time: self.key_create_time.0,
            expire_time: self.expire_time.map(|time| time.0),
            last_use_time: self.last_use_time.map(|time| time.0),
        }
    }
}

/// A service account with one of its keys and the hash of the key's secret.
pub(super) struct ServiceSecretRow {
    account: ServiceRow,
    key: ServiceKeyRow,
    secret_hash: Vec<u8>,
}

macro_rules! service_secret_row {
    ($row:ty) => {
        impl FromRow<'_, $row> for ServiceSecretRow {
            fn from_row(row: &$row) -> Result<Self, sqlx::Error> {
                Ok(Self {
                    account: ServiceRow::from_row(row)?,
                    key: ServiceKeyRow::from_row(row)?,
                    secret_hash: row.try_get("secret_hash")?,
                })
            }
        }
    };
}
service_secret_row!(PgRow);
service_secret_row!(SqliteRow);

impl ServiceSecretRow {
    pub(super) fn into_parts(self) -> Result<(ServiceAccount, ServiceKey, SecretHash), StoreError> {
        let secret = self.secret_hash.try_into().map_err(|_| bad_column("service_keys.secret_hash"))?;
        Ok((self.account.into_account()?, self.key.into_key(), SecretHash(secret)))
    }
}
