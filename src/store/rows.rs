//! Rows as the database gives them, and what the domain makes of them. A row that makes no sense names its column.
//! Generic over the type that a backend keeps times in.

use sqlx::FromRow;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::domain::{
    AuditEventId, MailId, SessionId, UserId,
    account::{Email, User, Username},
    audit::AuditEvent,
    keyring::SealedSigningKey,
    mail::{MailKind, NewMail},
    one_time::{OneTimeGrant, Purpose},
    password::PasswordHash,
    role::Role,
    session::SessionSummary,
};

use super::{
    ClaimedMail, Credentials, LeavingSession, MailQueue, OneTimeToken, PresentedTo, RefreshHash, Revocation,
    RevokeReason, Revoked, StoreError,
};

/// The columns of [`UserRow`], of a table `users u`. `string_agg` and its `ORDER BY` are the same in both dialects.
macro_rules! user_columns {
    () => {
        "u.id, u.username, u.email, u.email_verified, u.disabled, u.create_time, u.update_time, \
         coalesce((SELECT string_agg(r.role, ' ' ORDER BY r.role) FROM user_roles r WHERE r.user_id = u.id), '') AS roles"
    };
}
pub(super) use user_columns;

/// A time as a backend keeps it.
pub(super) trait StoredTime {
    fn to_time(self) -> Result<OffsetDateTime, StoreError>;
}

impl StoredTime for OffsetDateTime {
    fn to_time(self) -> Result<OffsetDateTime, StoreError> {
        Ok(self)
    }
}

/// Microseconds since the Unix epoch.
impl StoredTime for i64 {
    fn to_time(self) -> Result<OffsetDateTime, StoreError> {
        OffsetDateTime::from_unix_timestamp_nanos(i128::from(self) * 1_000).map_err(StoreError::broken)
    }
}

fn bad_column(column: &str) -> StoreError {
    StoreError::broken(format!("column {column} holds what this version cannot read"))
}

#[derive(FromRow)]
pub(super) struct UserRow<T> {
    id: Uuid,
    username: String,
    email: String,
    email_verified: bool,
    disabled: bool,
    create_time: T,
    update_time: T,
    roles: String,
}

impl<T: StoredTime> UserRow<T> {
    pub(super) fn into_user(self) -> Result<User, StoreError> {
        Ok(User {
            id: UserId(self.id),
            username: Username::parse(&self.username).map_err(|_| bad_column("users.username"))?,
            email: Email::parse(&self.email).map_err(|_| bad_column("users.email"))?,
            email_verified: self.email_verified,
            roles: read_roles(&self.roles)?,
            disabled: self.disabled,
            create_time: self.create_time.to_time()?,
            update_time: self.update_time.to_time()?,
        })
    }
}

/// Roles as one text, separated by spaces.
pub(super) fn roles_text(roles: &[Role]) -> String {
    roles.iter().map(Role::as_str).collect::<Vec<_>>().join(" ")
}

/// Sorted here: in what order a database has them depends on its collation.
fn read_roles(text: &str) -> Result<Vec<Role>, StoreError> {
    let roles = text.split_whitespace().map(|name| Role::parse(name).ok_or_else(|| bad_column("role")));
    let mut roles: Vec<_> = roles.collect::<Result<_, _>>()?;
    roles.sort();
    Ok(roles)
}

#[derive(FromRow)]
pub(super) struct CredentialsRow<T> {
    #[sqlx(flatten)]
    user: UserRow<T>,
    password_hash: String,
    password_version: i64,
}

impl<T: StoredTime> CredentialsRow<T> {
    pub(super) fn into_credentials(self) -> Result<Credentials, StoreError> {
        Ok(Credentials {
            user: self.user.into_user()?,
            password_hash: PasswordHash::from_phc(self.password_hash),
            password_version: self.password_version,
        })
    }
}

/// The session and the user of a presented refresh token.
#[derive(FromRow)]
pub(super) struct PresentedRow<T> {
    #[sqlx(flatten)]
    user: UserRow<T>,
    generation: i64,
    refresh_hash: Vec<u8>,
    refresh_issue_time: T,
    refresh_expire_time: T,
    revoke_time: Option<T>,
    within_retry_window: bool,
}

/// The row, read: whom the session is of, what it is, and when its live token was minted.
pub(super) struct PresentedSession {
    pub user: User,
    pub state: PresentedTo,
    pub refresh_issue_time: OffsetDateTime,
}

impl<T: StoredTime> PresentedRow<T> {
    pub(super) fn into_session(self) -> Result<PresentedSession, StoreError> {
        let user = self.user.into_user()?;
        let state = PresentedTo {
            generation: self.generation,
            refresh_hash: refresh_hash(&self.refresh_hash)?,
            refresh_expire_time: self.refresh_expire_time.to_time()?,
            revoke_time: self.revoke_time.map(StoredTime::to_time).transpose()?,
            user_disabled: user.disabled,
            within_retry_window: self.within_retry_window,
        };
        Ok(PresentedSession { user, state, refresh_issue_time: self.refresh_issue_time.to_time()? })
    }
}

fn refresh_hash(bytes: &[u8]) -> Result<RefreshHash, StoreError> {
    bytes.try_into().map(RefreshHash).map_err(|_| bad_column("sessions.refresh_hash"))
}

/// The session of a token that is presented to log out.
#[derive(FromRow)]
pub(super) struct LeavingRow<T> {
    generation: i64,
    refresh_expire_time: T,
    revoke_reason: Option<String>,
}

impl<T: StoredTime> LeavingRow<T> {
    pub(super) fn into_session(self) -> Result<LeavingSession, StoreError> {
        Ok(LeavingSession {
            generation: self.generation,
            refresh_expire_time: self.refresh_expire_time.to_time()?,
            revoked_by_logout_everywhere: self.revoke_reason.as_deref()
                == Some(RevokeReason::LogoutEverywhere.as_str()),
            revoked: self.revoke_reason.is_some(),
        })
    }
}

#[derive(FromRow)]
pub(super) struct SigningKeyRow<T> {
    kid: String,
    algorithm: String,
    sealed_private_key: Vec<u8>,
    create_time: T,
}

impl<T: StoredTime> SigningKeyRow<T> {
    pub(super) fn into_key(self) -> Result<SealedSigningKey, StoreError> {
        Ok(SealedSigningKey {
            kid: self.kid,
            algorithm: self.algorithm,
            sealed_private_key: self.sealed_private_key,
            create_time: self.create_time.to_time()?,
        })
    }
}

/// A mail in the outbox, as it is leased.
#[derive(FromRow)]
pub(super) struct OutboxRow<T> {
    id: Uuid,
    kind: String,
    recipient: String,
    user_id: Option<Uuid>,
    new_email: Option<String>,
    create_time: T,
    attempts: i64,
}

/// The row, read: the mail, and which attempt to send it this is.
pub(super) struct LeasedMail {
    pub mail: NewMail,
    pub attempt: i64,
}

impl<T: StoredTime> OutboxRow<T> {
    pub(super) fn into_leased(self) -> Result<LeasedMail, StoreError> {
        let address = |text: &str| Email::parse(text).map_err(|_| bad_column("mail_outbox.recipient or new_email"));
        Ok(LeasedMail {
            mail: NewMail {
                id: MailId(self.id),
                kind: MailKind::parse(&self.kind).ok_or_else(|| bad_column("mail_outbox.kind"))?,
                recipient: address(&self.recipient)?,
                user_id: self.user_id.map(UserId),
                new_email: self.new_email.as_deref().map(address).transpose()?,
                create_time: self.create_time.to_time()?,
            },
            attempt: self.attempts,
        })
    }
}

impl LeasedMail {
    /// What the token in it is bound to, where it carries one.
    pub(super) fn grant(&self, user: &User) -> Option<OneTimeGrant> {
        self.mail.kind.purpose().map(|purpose| OneTimeGrant {
            id: self.mail.id,
            purpose,
            user_id: user.id,
            email: self.mail.recipient.clone(),
        })
    }

    pub(super) fn claimed(self, user: User, grant: Option<OneTimeGrant>) -> ClaimedMail {
        ClaimedMail {
            id: self.mail.id,
            kind: self.mail.kind,
            recipient: self.mail.recipient,
            username: user.username,
            new_email: self.mail.new_email,
            grant,
            attempt: self.attempt,
            create_time: self.mail.create_time,
        }
    }
}

#[derive(FromRow)]
pub(super) struct OneTimeTokenRow<T> {
    token_id: Uuid,
    purpose: String,
    token_email: String,
    expire_time: T,
    #[sqlx(flatten)]
    user: UserRow<T>,
}

impl<T: StoredTime> OneTimeTokenRow<T> {
    pub(super) fn into_token(self) -> Result<OneTimeToken, StoreError> {
        let user = self.user.into_user()?;
        Ok(OneTimeToken {
            grant: OneTimeGrant {
                id: MailId(self.token_id),
                purpose: Purpose::parse(&self.purpose).ok_or_else(|| bad_column("one_time_tokens.purpose"))?,
                user_id: user.id,
                email: Email::parse(&self.token_email).map_err(|_| bad_column("one_time_tokens.email"))?,
            },
            expire_time: self.expire_time.to_time()?,
            user,
        })
    }
}

#[derive(FromRow)]
pub(super) struct MailQueueRow {
    waiting: i64,
    dead: i64,
}

impl MailQueueRow {
    pub(super) fn into_queue(self) -> MailQueue {
        MailQueue { waiting: self.waiting.unsigned_abs(), dead: self.dead.unsigned_abs() }
    }
}

/// A session, as its owner sees it.
#[derive(FromRow)]
pub(super) struct SessionRow<T> {
    id: Uuid,
    create_time: T,
    last_refresh_time: T,
    refresh_expire_time: T,
    client_ip: Option<String>,
    user_agent: Option<String>,
}

impl<T: StoredTime> SessionRow<T> {
    pub(super) fn into_summary(self) -> Result<SessionSummary, StoreError> {
        Ok(SessionSummary {
            id: SessionId(self.id),
            create_time: self.create_time.to_time()?,
            last_refresh_time: self.last_refresh_time.to_time()?,
            expire_time: self.refresh_expire_time.to_time()?,
            client_ip: self.client_ip,
            user_agent: self.user_agent,
        })
    }
}

#[derive(FromRow)]
pub(super) struct AuditRow<T> {
    id: Uuid,
    create_time: T,
    action: String,
    actor_id: Option<Uuid>,
    user_id: Option<Uuid>,
    session_id: Option<Uuid>,
    client_ip: Option<String>,
    detail: Option<String>,
}

impl<T: StoredTime> AuditRow<T> {
    pub(super) fn into_event(self) -> Result<AuditEvent, StoreError> {
        Ok(AuditEvent {
            id: AuditEventId(self.id),
            create_time: self.create_time.to_time()?,
            action: self.action,
            actor: self.actor_id.map(UserId),
            user: self.user_id.map(UserId),
            session: self.session_id.map(SessionId),
            client_ip: self.client_ip,
            detail: self.detail,
        })
    }
}

/// A line of the log of revocations.
#[derive(FromRow)]
pub(super) struct RevocationRow<T> {
    number: i64,
    session_id: Option<Uuid>,
    user_id: Option<Uuid>,
    roles: Option<String>,
    forget_time: T,
}

impl<T: StoredTime> RevocationRow<T> {
    pub(super) fn into_revocation(self) -> Result<Revocation, StoreError> {
        let what = match (self.session_id, self.user_id) {
            (Some(session), None) => Revoked::Session(SessionId(session)),
            (None, Some(user)) => Revoked::Roles(UserId(user), read_roles(&self.roles.unwrap_or_default())?),
            (Some(_), Some(_)) | (None, None) => return Err(bad_column("revocations.session_id or user_id")),
        };
        Ok(Revocation { number: self.number, what, forget_time: self.forget_time.to_time()? })
    }
}
