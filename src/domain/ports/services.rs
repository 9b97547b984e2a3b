//! The steps of service accounts and their keys.

use async_trait::async_trait;
use time::OffsetDateTime;

use crate::{
    domain::{
        audit::AuditContext,
        ids::{ServiceAccountId, ServiceKeyId, TokenId},
        role::Role,
        service_account::{SecretHash, ServiceAccount, ServiceKey},
    },
    error::StoreError,
};

/// Service accounts, and their keys. What ends tokens is written to the log of revocations in the same step: an account in
/// the place of a user, a key in the place of a session.
#[async_trait]
pub trait ServiceStore {
    /// Creates an account, unless there are `most` already. Creations at the same time on several replicas can exceed that by
    /// as many as they are.
    async fn create_service(
        &self,
        account: ServiceAccount,
        most: u32,
        context: AuditContext,
    ) -> Result<ServiceCreation, StoreError>;

    /// Replaces the roles of an account. `None` if there is none.
    async fn set_service_roles(
        &self,
        id: ServiceAccountId,
        roles: Vec<Role>,
        context: AuditContext,
    ) -> Result<Option<ServiceAccount>, StoreError>;

    /// Disables an account, with a reason for the audit log, or enables it. `None` if there is none.
    async fn set_service_disabled(
        &self,
        id: ServiceAccountId,
        disabled: bool,
        reason: Option<String>,
        context: AuditContext,
    ) -> Result<Option<ServiceAccount>, StoreError>;

    /// Deletes an account and its keys. `false` if there is none.
    async fn delete_service(&self, id: ServiceAccountId, context: AuditContext) -> Result<bool, StoreError>;

    /// Creates a key.
    async fn create_service_key(&self, key: NewServiceKey) -> Result<KeyCreation, StoreError>;

    /// Deletes a key of an account. `false` if there is none.
    async fn delete_service_key(
        &self,
        account: ServiceAccountId,
        key: ServiceKeyId,
        context: AuditContext,
    ) -> Result<bool, StoreError>;

    /// Ends one token of an account.
    async fn revoke_service_token(
        &self,
        account: ServiceAccountId,
        token: TokenId,
        context: AuditContext,
    ) -> Result<(), StoreError>;

    /// Notes that a key was used at a time.
    async fn service_key_used(&self, key: ServiceKeyId, time: OffsetDateTime) -> Result<(), StoreError>;

    /// The account with this id.
    async fn service(&self, id: ServiceAccountId) -> Result<Option<ServiceAccount>, StoreError>;

    /// The account with this name.
    async fn service_by_name(&self, name: &str) -> Result<Option<ServiceAccount>, StoreError>;

    /// A page of accounts after this one, oldest first.
    async fn list_services(
        &self,
        after: Option<ServiceAccountId>,
        limit: u32,
    ) -> Result<Vec<ServiceAccount>, StoreError>;

    /// The keys of an account, oldest first. There are never many.
    async fn list_service_keys(&self, account: ServiceAccountId) -> Result<Vec<ServiceKey>, StoreError>;

    /// An account with the secrets of its keys, in one look. `None` if there is no such account or it has no key.
    async fn service_credentials(&self, id: ServiceAccountId) -> Result<Option<ServiceCredentials>, StoreError>;
}

/// The result of creating a service account.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServiceCreation {
    Created,
    /// Another one has its name.
    NameTaken,
    TooMany,
}

/// A key to create.
#[derive(Debug, Clone)]
pub struct NewServiceKey {
    pub key: ServiceKey,
    pub secret: SecretHash,
    /// How many keys the account may have.
    pub most: u32,
    pub context: AuditContext,
}

/// The result of creating a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyCreation {
    Created,
    NoSuchAccount,
    /// The account has as many keys as it may have.
    TooMany,
}

/// What a presented secret is compared with.
#[derive(Debug)]
pub struct ServiceCredentials {
    pub account: ServiceAccount,
    pub keys: Vec<(ServiceKey, SecretHash)>,
}
