//! A store whose steps are parts of the traces of their callers. It stands around another one where traces are
//! recorded, and nowhere else.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use time::OffsetDateTime;

use crate::{
    domain::{
        account::{Email, User},
        audit::{AuditContext, AuditEvent},
        ids::{MailId, ServiceAccountId, ServiceKeyId, SessionId, TokenId, UserId},
        mail::NewMail,
        one_time::OneTimeGrant,
        ports::{
            AccountCreation, AccountStore, AdminStore, AuditPage, Connections, Credentials, EmailChange,
            EmailChangeRequest, EmailConfirmation, EmailConfirmationOutcome, EmailVerification, Enqueued, KeyChange,
            KeyCreation, KeyStore, LoginAttempt, LoginStart, Logout, LogoutOutcome, MailClaim, MailQueue, MailRetry,
            MailStore, NewAccount, NewServiceKey, NewSession, OneTimeToken, PasswordChange, PasswordReset,
            PasswordResetOutcome, PurgeStore, Queries, Reservation, Revocation, Rotation, RotationOutcome,
            SealedSigningKey, ServiceCreation, ServiceCredentials, ServiceStore, SessionOpening, SessionPage,
            SessionStore, Store, SurplusSessions, UserChange, UserDeletion, UserDeletionOutcome, UserPage,
            UsernameChange, UsernameChangeOutcome,
        },
        role::Role,
        seen::SeenGeneration,
        service_account::{ServiceAccount, ServiceKey},
        session::SessionSummary,
        throttle::{AddressLimit, AttemptSubject},
    },
    error::StoreError,
    trace::Span,
};

/// The store, and the name of its database by OpenTelemetry's conventions.
pub(super) struct Traced {
    pub store: Arc<dyn Store>,
    pub system: &'static str,
}

impl Traced {
    async fn step<T>(
        &self,
        name: &'static str,
        work: impl Future<Output = Result<T, StoreError>> + Send,
    ) -> Result<T, StoreError> {
        let span = Span::outside(name);
        span.set("db.system.name", self.system);
        let outcome = span.run(work).await;
        if outcome.is_err() {
            span.failed();
        }
        outcome
    }
}

/// Passes on the steps of each port, in spans with their names, and a wait (`@`) without one.
macro_rules! traced {
    ($($port:ident {
        $($step:ident($($name:ident: $type:ty),*) -> $outcome:ty;)*
        $(@ $wait:ident;)?
    })*) => {$(
        #[async_trait]
        impl $port for Traced {
            $(async fn $step(&self, $($name: $type),*) -> Result<$outcome, StoreError> {
                self.step(concat!("store ", stringify!($step)), self.store.$step($($name),*)).await
            })*
            $(async fn $wait(&self) {
                self.store.$wait().await;
            })?
        }
    )*};
}

traced! {
    AccountStore {
        create_account(account: NewAccount) -> AccountCreation;
        verify_email(verification: EmailVerification) -> Option<User>;
        reset_password(reset: PasswordReset) -> PasswordResetOutcome;
        change_password(change: PasswordChange) -> SessionOpening;
        request_email_change(change: EmailChange) -> EmailChangeRequest;
        confirm_email_change(confirmation: EmailConfirmation) -> EmailConfirmationOutcome;
        change_username(change: UsernameChange) -> UsernameChangeOutcome;
    }
    AdminStore {
        set_roles(user: UserId, roles: Vec<Role>, context: AuditContext) -> UserChange;
        disable_user(user: UserId, reason: Option<String>, context: AuditContext) -> UserChange;
        enable_user(user: UserId, context: AuditContext) -> UserChange;
        revoke_user_sessions(user: UserId, context: AuditContext) -> Option<u64>;
        delete_user(deletion: UserDeletion) -> UserDeletionOutcome;
        revoke_session(session: SessionId, user: UserId, context: AuditContext) -> bool;
    }
    SessionStore {
        open_session(session: NewSession) -> SessionOpening;
        end_surplus_sessions(surplus: SurplusSessions) -> bool;
        rotate_refresh(rotation: Rotation) -> RotationOutcome;
        write_seen(seen: &[SeenGeneration]) -> Vec<SessionId>;
        logout(logout: Logout) -> LogoutOutcome;
        start_login(attempt: LoginAttempt, email: &Email) -> LoginStart;
        reserve_attempt(attempt: LoginAttempt) -> Reservation;
        attempt_succeeded(subject: AttemptSubject) -> ();
        attempt_abandoned(subject: AttemptSubject) -> ();
        attempt_failed(attempt: LoginAttempt, user: Option<UserId>, context: AuditContext) -> ();
        revocations(after: i64, wanted: &[i64]) -> Vec<Revocation>;
        @ revocation_written;
    }
    ServiceStore {
        create_service(account: ServiceAccount, most: u32, context: AuditContext) -> ServiceCreation;
        set_service_roles(id: ServiceAccountId, roles: Vec<Role>, context: AuditContext) -> Option<ServiceAccount>;
        set_service_disabled(
            id: ServiceAccountId,
            disabled: bool,
            reason: Option<String>,
            context: AuditContext
        ) -> Option<ServiceAccount>;
        delete_service(id: ServiceAccountId, context: AuditContext) -> bool;
        create_service_key(key: NewServiceKey) -> KeyCreation;
        delete_service_key(account: ServiceAccountId, key: ServiceKeyId, context: AuditContext) -> bool;
        revoke_service_token(account: ServiceAccountId, token: TokenId, context: AuditContext) -> ();
        service_key_used(key: ServiceKeyId, time: OffsetDateTime) -> ();
        service(id: ServiceAccountId) -> Option<ServiceAccount>;
        service_by_name(name: &str) -> Option<ServiceAccount>;
        list_services(after: Option<ServiceAccountId>, limit: u32) -> Vec<ServiceAccount>;
        list_service_keys(account: ServiceAccountId) -> Vec<ServiceKey>;
        service_credentials(id: ServiceAccountId) -> Option<ServiceCredentials>;
    }
    KeyStore {
        signing_keys() -> Vec<SealedSigningKey>;
        change_signing_keys(change: KeyChange) -> bool;
    }
    MailStore {
        request_mail(mail: NewMail, limit: AddressLimit) -> Enqueued;
        claim_mail(now: OffsetDateTime, lease: Duration) -> MailClaim;
        mail_sent(mail: MailId, attempt: i64) -> bool;
        mail_failed(mail: MailId, attempt: i64, retry: MailRetry, now: OffsetDateTime) -> bool;
        issue_token(token: OneTimeGrant, context: AuditContext) -> bool;
        @ mail_queued;
    }
    PurgeStore {
        purge_sessions(now: OffsetDateTime, limit: u32) -> u64;
        purge_mail(now: OffsetDateTime, dead_before: OffsetDateTime, limit: u32) -> u64;
        purge_revocations(now: OffsetDateTime, settled: i64, limit: u32) -> u64;
        purge_attempts(now: OffsetDateTime, after: Option<AttemptSubject>, limit: u32) -> Option<AttemptSubject>;
        purge_audit_events(before: OffsetDateTime, limit: u32) -> u64;
    }
    Queries {
        user(id: UserId) -> Option<User>;
        user_of_session(session: SessionId, user: UserId) -> Option<User>;
        credentials(email: &Email) -> Option<Credentials>;
        credentials_of_session(session: SessionId, user: UserId) -> Option<Credentials>;
        list_users(page: UserPage) -> Vec<User>;
        list_sessions(page: SessionPage) -> Vec<SessionSummary>;
        list_audit_events(page: AuditPage) -> Vec<AuditEvent>;
        revocation_page(after: i64, up_to: i64, limit: u32) -> Vec<Revocation>;
        one_time_token(token: MailId) -> Option<OneTimeToken>;
        password_parameters() -> Vec<String>;
        mail_queue() -> MailQueue;
    }
}

#[async_trait]
impl Store for Traced {
    async fn ping(&self) -> Result<(), StoreError> {
        self.store.ping().await
    }

    fn time(&self, now: OffsetDateTime) -> OffsetDateTime {
        self.store.time(now)
    }

    fn ensure_reachable(&self) -> Result<(), StoreError> {
        self.store.ensure_reachable()
    }

    fn connections(&self) -> Connections {
        self.store.connections()
    }

    async fn close(&self) -> Result<(), StoreError> {
        self.store.close().await
    }

    async fn add_first_signing_key(&self, key: SealedSigningKey) -> Result<(), StoreError> {
        self.store.add_first_signing_key(key).await
    }
}
