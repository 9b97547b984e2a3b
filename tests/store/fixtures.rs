//! Accounts and sessions as the domain passes them to a store, and helpers that call a store, the same on every engine.
//! No token is minted here: for a store, a token is its generation and its hash.

use std::time::Duration;

use postern::domain::{
    account::{Email, User, Username},
    audit::{AuditContext, AuditEvent},
    env::Env,
    ids::{AuditEventId, MailId, SessionId, UserId},
    mail::{MailKind, NewMail},
    one_time::{OneTimeGrant, Purpose},
    password::PasswordHash,
    ports::{
        AccountCreation, AuditPage, ClaimedMail, EmailChange, EmailConfirmation, EmailConfirmationOutcome,
        EmailVerification, Enqueued, Logout, LogoutOutcome, MailClaim, NewAccount, NewSession, PasswordChange,
        PasswordReset, PasswordResetOutcome, Rotation, RotationOutcome, SessionOpening, SessionPage, Store,
        UserDeletion, UsernameChange,
    },
    role::Role,
    session::{RefreshGrant, RefreshHash},
    throttle::{AddressLimit, AttemptSubject},
};
use time::{OffsetDateTime, ext::NumericalDuration as _, macros::datetime};
use uuid::Uuid;

use crate::support::Database;

/// The current time, with microseconds: every engine has to store them.
pub const NOW: OffsetDateTime = datetime!(2030-01-02 03:04:05.678_901 UTC);
/// The same in whole seconds, as in tokens.
pub const ISSUED: OffsetDateTime = datetime!(2030-01-02 03:04:05 UTC);
/// The retry window of every rotation, unless a test sets another. There is no window for lost answers.
pub const WINDOW: Duration = Duration::from_secs(10);
/// The mail limit of an address, unless a test sets another.
pub const LIMIT: AddressLimit = AddressLimit { burst: 10, interval: Duration::from_mins(6) };
/// A mail limit that no test reaches.
pub const NO_LIMIT: AddressLimit = AddressLimit { burst: 10_000, interval: Duration::from_mins(6) };
/// How long the claim of a mail holds, unless a test sets another time.
pub const LEASE: Duration = Duration::from_hours(1);
/// The password hash of every new account.
pub const OLD_HASH: &str = "$argon2id$v=19$m=64,t=1,p=1$b2xk$b2xk";
/// The password hash that every reset and every change of a password sets.
pub const NEW_HASH: &str = "$argon2id$v=19$m=64,t=1,p=1$bmV3$bmV3";

pub fn new_id() -> Uuid {
    Env::system().uuid().expect("randomness")
}

/// The audit context of a step at [`NOW`] without an actor. Each call returns another event id.
pub fn audit_context() -> AuditContext {
    audit_context_at(NOW)
}

/// The same at another time. Access tokens issued before it have expired 15 minutes later.
pub fn audit_context_at(now: OffsetDateTime) -> AuditContext {
    AuditContext { event: AuditEventId(new_id()), now, actor: None, client_ip: None, retain_until: now + 15.minutes() }
}

/// The subject under which password attempts for an address are counted.
pub fn subject(address: &str) -> AttemptSubject {
    AttemptSubject(RefreshHash::of(address).0)
}

/// The account that `name` signs up with.
pub fn new_account(name: &str) -> NewAccount {
    let id = UserId(new_id());
    NewAccount {
        id,
        username: Username::parse(name).expect("a username"),
        email: address(&format!("{name}@example.com")),
        password_hash: PasswordHash::from_phc(OLD_HASH.to_owned()),
        context: audit_context(),
        email_verified: false,
        roles: None,
        verification: mail(MailKind::VerifyEmail, &format!("{name}@example.com"), Some(id)),
        withholds_mail: false,
        owner_notice: None,
        limit: LIMIT,
    }
}

/// A mail that is created at [`NOW`].
pub fn mail(kind: MailKind, recipient: &str, user_id: Option<UserId>) -> NewMail {
    let (id, recipient) = (MailId(new_id()), address(recipient));
    NewMail { id, kind, recipient, user_id, new_email: None, create_time: NOW, trace: None }
}

pub fn address(text: &str) -> Email {
    Email::parse(text).expect("an address")
}

/// Creates the account of `name`.
pub async fn sign_up(store: &dyn Store, name: &str) -> User {
    match store.create_account(new_account(name)).await.expect("the store") {
        AccountCreation::Created(user) => user,
        refused => panic!("{name} cannot sign up: {refused:?}"),
    }
}

/// A session to open for a user whose password has version 0.
pub fn new_session(user: UserId) -> NewSession {
    let session_id = SessionId(new_id());
    NewSession {
        grant: RefreshGrant {
            session_id,
            user_id: user,
            generation: 0,
            issue_time: ISSUED,
            expire_time: ISSUED + 7.days(),
            session_end_time: ISSUED + 90.days(),
        },
        refresh_hash: RefreshHash::of(&format!("{session_id} 0")),
        most: 1_000,
        password_version: 0,
        rehash: None,
        user_agent: None,
        attempt: None,
        context: audit_context(),
    }
}

/// Opens a session of a user and returns its first token.
pub async fn log_in(store: &dyn Store, user: &User) -> Token {
    let session = new_session(user.id);
    let token = Token { grant: session.grant.clone(), hash: session.refresh_hash };
    let opening = store.open_session(session).await.expect("the store");
    assert_eq!(opening, SessionOpening::Opened(user.clone()));
    token
}

/// A refresh token, as a store knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    pub grant: RefreshGrant,
    pub hash: RefreshHash,
}

impl Token {
    /// The next token of the session, issued an hour later. Successors with different labels have different hashes.
    pub fn successor(&self, label: &str) -> Self {
        let generation = self.grant.generation + 1;
        Self {
            hash: RefreshHash::of(&format!("{} {generation} {label}", self.grant.session_id)),
            grant: RefreshGrant {
                generation,
                issue_time: self.grant.issue_time + 1.hours(),
                expire_time: self.grant.expire_time + 1.hours(),
                ..self.grant.clone()
            },
        }
    }

    /// Presents this token, with `next` as its replacement.
    pub fn replaced_by(&self, next: &Self) -> Rotation {
        Rotation {
            presented_generation: self.grant.generation,
            presented_hash: self.hash,
            presented_expire_time: self.grant.expire_time,
            next: next.grant.clone(),
            next_hash: next.hash,
            context: audit_context(),
            retry_window: WINDOW,
            lost_answer_window: Duration::ZERO,
            seen_generation: 0,
        }
    }

    /// Presents this token, with its default successor as the replacement.
    pub fn rotation(&self) -> Rotation {
        self.replaced_by(&self.successor(""))
    }

    pub fn logout(&self) -> Logout {
        Logout {
            session_id: self.grant.session_id,
            user_id: self.grant.user_id,
            presented_generation: self.grant.generation,
            everywhere: false,
            context: audit_context(),
        }
    }

    pub fn logout_everywhere(&self) -> Logout {
        Logout { everywhere: true, ..self.logout() }
    }
}

/// Rotates the current token and returns the next one.
pub async fn refresh(store: &dyn Store, token: &Token) -> Token {
    let next = token.successor("");
    match store.rotate_refresh(token.replaced_by(&next)).await.expect("the store") {
        RotationOutcome::Rotated(_) => next,
        other => panic!("the token is not the current one: {other:?}"),
    }
}

/// Ends a session by logout.
pub async fn log_out(store: &dyn Store, token: &Token) {
    assert_eq!(store.logout(token.logout()).await.expect("the store"), LogoutOutcome::LoggedOut);
}

/// All sessions of a user, on one page.
pub fn all_sessions(user: UserId, now: OffsetDateTime) -> SessionPage {
    SessionPage { user, now, before: None, limit: 1_000 }
}

/// Whether access tokens of the session are accepted.
pub async fn is_alive(store: &dyn Store, token: &Token) -> bool {
    let user = store.user_of_session(token.grant.session_id, token.grant.user_id).await.expect("the store");
    user.is_some()
}

/// Creates the account of `name` and deletes its verification mail, so that the account has no mail and no token.
pub async fn sign_up_without_mail(database: &Database, store: &dyn Store, name: &str) -> User {
    let user = sign_up(store, name).await;
    let id = database.id(user.id.0);
    database.sql.execute(&format!("DELETE FROM mail_outbox WHERE user_id = {id}")).await;
    user
}

/// Queues a mail, without a limit.
pub async fn queue_mail(store: &dyn Store, mail: &NewMail) {
    assert_eq!(store.request_mail(mail.clone(), NO_LIMIT).await.expect("the store"), Enqueued::Queued);
}

pub async fn claim(store: &dyn Store) -> MailClaim {
    store.claim_mail(NOW, LEASE).await.expect("the store")
}

/// Claims a mail that is due.
pub async fn claimed(store: &dyn Store) -> ClaimedMail {
    match claim(store).await {
        MailClaim::Claimed(mail) => mail,
        other => panic!("no mail was claimed: {other:?}"),
    }
}

/// Claims every mail that is due, settles it as sent, and returns them.
pub async fn deliver(store: &dyn Store) -> Vec<ClaimedMail> {
    let mut delivered = Vec::new();
    loop {
        match claim(store).await {
            MailClaim::Claimed(mail) => {
                assert!(store.mail_sent(mail.id, mail.attempt).await.expect("the store"), "{mail:?}");
                delivered.push(mail);
            }
            MailClaim::Dropped(_) => {}
            MailClaim::NoneDue => return delivered,
        }
    }
}

/// A mail that carries a token to a user: to the address of the account or, for a change of address, to the new one.
pub fn mail_with_token(user: &User, purpose: Purpose) -> NewMail {
    let current = user.email.as_str();
    match purpose {
        Purpose::VerifyEmail | Purpose::ResetPassword => mail(MailKind::carrying(purpose), current, Some(user.id)),
        Purpose::ChangeEmail => {
            let to = mail(MailKind::carrying(purpose), &format!("new-{current}"), Some(user.id));
            NewMail { new_email: Some(to.recipient.clone()), ..to }
        }
    }
}

/// A live token of a user, from a mail that was sent.
pub async fn token(store: &dyn Store, user: &User, purpose: Purpose) -> OneTimeGrant {
    let mail = mail_with_token(user, purpose);
    queue_mail(store, &mail).await;
    let delivered = deliver(store).await;
    let sent = delivered.into_iter().find(|delivered| delivered.id == mail.id).expect("the mail was sent");
    sent.grant.expect("a token")
}

/// A verification by this token, without a session.
pub fn verification(token: OneTimeGrant, context: AuditContext) -> EmailVerification {
    EmailVerification { token, session: None, no_password: PasswordHash::from_phc(NEW_HASH.to_owned()), context }
}

/// Runs the step that consumes this token. Returns whether the token was accepted.
pub async fn consume_token(store: &dyn Store, token: OneTimeGrant, now: OffsetDateTime) -> bool {
    match token.purpose {
        Purpose::VerifyEmail => {
            store.verify_email(verification(token, audit_context_at(now))).await.expect("the store").is_some()
        }
        Purpose::ResetPassword => {
            let reset = PasswordReset { context: audit_context_at(now), ..reset_by(token) };
            store.reset_password(reset).await.expect("the store") == PasswordResetOutcome::Reset
        }
        Purpose::ChangeEmail => {
            let confirmation = EmailConfirmation { context: audit_context_at(now), ..confirmation_by(token) };
            let outcome = store.confirm_email_change(confirmation).await.expect("the store");
            matches!(outcome, EmailConfirmationOutcome::Changed(_))
        }
    }
}

pub fn reset_by(token: OneTimeGrant) -> PasswordReset {
    let notice = mail(MailKind::PasswordChanged, token.email.as_str(), Some(token.user_id));
    let attempts = subject(token.email.as_str());
    let password_hash = PasswordHash::from_phc(NEW_HASH.to_owned());
    PasswordReset { token, password_hash, notice, attempts, context: audit_context() }
}

pub fn confirmation_by(token: OneTimeGrant) -> EmailConfirmation {
    EmailConfirmation { token, notice: MailId(new_id()), context: audit_context(), eviction: audit_context() }
}

/// A change of the password of version 0.
pub fn password_change(user: &User) -> PasswordChange {
    PasswordChange {
        password_hash: PasswordHash::from_phc(NEW_HASH.to_owned()),
        caller: SessionId(new_id()),
        session: new_session(user.id),
        notice: mail(MailKind::PasswordChanged, user.email.as_str(), Some(user.id)),
        limit: NO_LIMIT,
    }
}

/// A request for a change of address, by a user whose password has version 0.
pub fn email_change(user: &User, new: &str) -> EmailChange {
    let with_new_email = |mail: NewMail| NewMail { new_email: Some(address(new)), ..mail };
    EmailChange {
        user_id: user.id,
        caller: SessionId(new_id()),
        password_version: 0,
        confirmation: with_new_email(mail(MailKind::ConfirmEmailChange, new, Some(user.id))),
        notice: with_new_email(mail(MailKind::EmailChangeRequested, user.email.as_str(), Some(user.id))),
        owner_notice: None,
        context: audit_context(),
        limit: LIMIT,
    }
}

/// A change of the username, by a user whose password has version 0.
pub fn username_change(user: &User, new: &str) -> UsernameChange {
    UsernameChange {
        user_id: user.id,
        caller: SessionId(new_id()),
        password_version: 0,
        username: Username::parse(new).expect("a username"),
        context: audit_context(),
    }
}

/// An audit context with a client address and a time later than [`NOW`], so that a test sees both in the audit row.
pub fn audit_context_by(actor: Option<UserId>) -> AuditContext {
    let client_ip = Some("2001:db8::7".parse().expect("an address"));
    let actor = actor.map(Into::into);
    AuditContext { actor, client_ip, ..audit_context_at(NOW + 90.seconds() + 7.microseconds()) }
}

pub fn roles(names: &[&str]) -> Vec<Role> {
    names.iter().map(|name| Role::parse(name).expect("a role")).collect()
}

/// Creates the account of `name` with the role `admin`.
pub async fn sign_up_admin(database: &Database, store: &dyn Store, name: &str) -> User {
    let user = sign_up_without_mail(database, store, name).await;
    database.add_role(user.id, "admin").await;
    User { roles: roles(&["admin", "user"]), ..user }
}

/// Every row of the audit log, newest first.
pub async fn audit(store: &dyn Store) -> Vec<AuditEvent> {
    let page = AuditPage { user: None, action: None, before: None, limit: 100_000 };
    store.list_audit_events(page).await.expect("the store")
}

pub fn deletion(user: &User) -> UserDeletion {
    UserDeletion { user: user.id, password_version: None, context: audit_context() }
}
