//! The steps of service accounts and their keys, and their queries.

use async_trait::async_trait;
use time::OffsetDateTime;

use crate::{
    domain::{
        audit::{Action, AuditContext, AuditTarget},
        ids::{ServiceAccountId, ServiceKeyId, SessionId, TokenId, UserId},
        ports::{KeyCreation, NewServiceKey, ServiceCreation, ServiceCredentials, ServiceStore},
        role::Role,
        service_account::{ServiceAccount, ServiceKey},
    },
    error::StoreError,
    store::{
        rows::{
            NO_ROLES, SERVICE_BY_ID, ServiceKeyRow, ServiceRow, ServiceSecretRow, roles_text, service_columns,
            service_key_columns,
        },
        statement::Statement,
    },
};

use super::transaction::{Backend, WriteTransaction, write};

#[async_trait]
impl<B: Backend> ServiceStore for B {
    async fn create_service(
        &self,
        account: ServiceAccount,
        most: u32,
        context: AuditContext,
    ) -> Result<ServiceCreation, StoreError> {
        write(self, move |tx| create_service(tx, account, most, context)).await
    }

    async fn set_service_roles(
        &self,
        id: ServiceAccountId,
        roles: Vec<Role>,
        context: AuditContext,
    ) -> Result<Option<ServiceAccount>, StoreError> {
        write(self, move |tx| set_roles(tx, id, roles, context)).await
    }

    async fn set_service_disabled(
        &self,
        id: ServiceAccountId,
        disabled: bool,
        reason: Option<String>,
        context: AuditContext,
    ) -> Result<Option<ServiceAccount>, StoreError> {
        write(self, move |tx| set_disabled(tx, id, disabled, reason, context)).await
    }

    async fn delete_service(&self, id: ServiceAccountId, context: AuditContext) -> Result<bool, StoreError> {
        write(self, move |tx| delete_service(tx, id, context)).await
    }

    async fn create_service_key(&self, key: NewServiceKey) -> Result<KeyCreation, StoreError> {
        write(self, move |tx| create_key(tx, key)).await
    }

    async fn delete_service_key(
        &self,
        account: ServiceAccountId,
        key: ServiceKeyId,
        context: AuditContext,
    ) -> Result<bool, StoreError> {
        write(self, move |tx| delete_key(tx, account, key, context)).await
    }

    async fn revoke_service_token(
        &self,
        account: ServiceAccountId,
        token: TokenId,
        context: AuditContext,
    ) -> Result<(), StoreError> {
        write(self, move |tx| revoke_token(tx, account, token, context)).await
    }

    async fn service_key_used(&self, key: ServiceKeyId, time: OffsetDateTime) -> Result<(), StoreError> {
        let statement = Statement::new(
            "UPDATE service_keys SET last_use_time = $2 WHERE id = $1 AND (last_use_time IS NULL OR last_use_time < $2)",
        );
        self.execute(statement.bind(key.0).bind(time)).await.map(drop)
    }

    async fn service(&self, id: ServiceAccountId) -> Result<Option<ServiceAccount>, StoreError> {
        one(self.rows(Statement::new(SERVICE_BY_ID).bind(id.0)).await?)
    }

    async fn service_by_name(&self, name: &str) -> Result<Option<ServiceAccount>, StoreError> {
        let query =
            Statement::new(concat!("SELECT ", service_columns!(), " FROM service_accounts a WHERE a.name = $1"));
        one(self.rows(query.bind(name)).await?)
    }

    async fn list_services(
        &self,
        after: Option<ServiceAccountId>,
        limit: u32,
    ) -> Result<Vec<ServiceAccount>, StoreError> {
        let query = Statement::new(concat!(
            "SELECT ",
            service_columns!(),
            " FROM service_accounts a WHERE a.id > $1 ORDER BY a.id LIMIT $2"
        ))
        .bind(after.map_or(uuid::Uuid::nil(), |after| after.0))
        .bind(i64::from(limit));
        self.rows::<ServiceRow>(query).await?.into_iter().map(ServiceRow::into_account).collect()
    }

    async fn list_service_keys(&self, account: ServiceAccountId) -> Result<Vec<ServiceKey>, StoreError> {
        let query = Statement::new(concat!(
            "SELECT ",
            service_key_columns!(),
            " FROM service_keys k WHERE k.service_account_id = $1 ORDER BY k.id"
        ));
        let rows: Vec<ServiceKeyRow> = self.rows(query.bind(account.0)).await?;
        Ok(rows.into_iter().map(ServiceKeyRow::into_key).collect())
    }

    async fn service_credentials(&self, id: ServiceAccountId) -> Result<Option<ServiceCredentials>, StoreError> {
        let query = Statement::new(concat!(
            "SELECT ",
            service_columns!(),
            ", ",
            service_key_columns!(),
            ", k.secret_hash FROM service_accounts a JOIN service_keys k ON k.service_account_id = a.id WHERE a.id = $1"
        ));
        let rows: Vec<ServiceSecretRow> = self.rows(query.bind(id.0)).await?;
        let (mut account, mut keys) = (None, Vec::new());
        for row in rows {
            let (found, key, secret) = row.into_parts()?;
            account = Some(found);
            keys.push((key, secret));
        }
        Ok(account.map(|account| ServiceCredentials { account, keys }))
    }
}

fn one(rows: Vec<ServiceRow>) -> Result<Option<ServiceAccount>, StoreError> {
    rows.into_iter().next().map(ServiceRow::into_account).transpose()
}

/// Its roles in the log of revocations, where an empty text means that its tokens are refused.
fn logged_roles(account: &ServiceAccount) -> String {
    match (account.disabled, account.roles.is_empty()) {
        (true, _) => String::new(),
        (false, true) => NO_ROLES.to_owned(),
        (false, false) => roles_text(&account.roles),
    }
}

async fn create_service(
    mut tx: impl WriteTransaction,
    account: ServiceAccount,
    most: u32,
    context: AuditContext,
) -> Result<ServiceCreation, StoreError> {
    if tx.number(Statement::new("SELECT count(*) FROM service_accounts")).await? >= i64::from(most) {
        return Ok(ServiceCreation::TooMany);
    }
    let statement = Statement::new(
        "INSERT INTO service_accounts (id, name, roles, disabled, create_time, update_time) \
         VALUES ($1, $2, $3, $4, $5, $5) ON CONFLICT (name) DO NOTHING",
    )
    .bind(account.id.0)
    .bind(account.name.as_str())
    .bind(roles_text(&account.roles).as_str())
    .bind(account.disabled)
    .bind(account.create_time);
    if !tx.changes_one(statement).await? {
        return Ok(ServiceCreation::NameTaken);
    }
    let target = AuditTarget::user(account.id.into()).detail(account.name.as_str().to_owned());
    tx.record(Action::ServiceCreated, &context, target).await?;
    tx.commit().await?;
    Ok(ServiceCreation::Created)
}

async fn set_roles(
    mut tx: impl WriteTransaction,
    id: ServiceAccountId,
    roles: Vec<Role>,
    context: AuditContext,
) -> Result<Option<ServiceAccount>, StoreError> {
    let Some(before) = tx.lock_service(id).await? else {
        return Ok(None);
    };
    if before.roles == roles {
        return Ok(Some(before));
    }
    let detail = format!("{} -> {}", roles_text(&before.roles), roles_text(&roles));
    let account = ServiceAccount { roles, update_time: context.now, ..before };
    update(&mut tx, &account).await?;
    tx.log_roles_text(id.into(), &logged_roles(&account), &context).await?;
    tx.record(Action::RolesChanged, &context, AuditTarget::user(id.into()).detail(detail)).await?;
    tx.commit().await?;
    Ok(Some(account))
}

async fn set_disabled(
    mut tx: impl WriteTransaction,
    id: ServiceAccountId,
    disabled: bool,
    reason: Option<String>,
    context: AuditContext,
) -> Result<Option<ServiceAccount>, StoreError> {
    let Some(before) = tx.lock_service(id).await? else {
        return Ok(None);
    };
    if before.disabled == disabled {
        return Ok(Some(before));
    }
    let account = ServiceAccount { disabled, update_time: context.now, ..before };
    update(&mut tx, &account).await?;
    tx.log_roles_text(id.into(), &logged_roles(&account), &context).await?;
    let action = if disabled { Action::ServiceDisabled } else { Action::ServiceEnabled };
    tx.record(action, &context, AuditTarget { detail: reason, ..AuditTarget::user(id.into()) }).await?;
    tx.commit().await?;
    Ok(Some(account))
}

async fn update<T: WriteTransaction>(tx: &mut T, account: &ServiceAccount) -> Result<(), StoreError> {
    let statement =
        Statement::new("UPDATE service_accounts SET roles = $2, disabled = $3, update_time = $4 WHERE id = $1")
            .bind(account.id.0)
            .bind(roles_text(&account.roles).as_str())
            .bind(account.disabled)
            .bind(account.update_time);
    tx.run(statement).await
}

async fn delete_service(
    mut tx: impl WriteTransaction,
    id: ServiceAccountId,
    context: AuditContext,
) -> Result<bool, StoreError> {
    let Some(before) = tx.lock_service(id).await? else {
        return Ok(false);
    };
    tx.run(Statement::new("DELETE FROM service_accounts WHERE id = $1").bind(id.0)).await?;
    tx.log_roles_text(id.into(), "", &context).await?;
    let target = AuditTarget::user(id.into()).detail(before.name.as_str().to_owned());
    tx.record(Action::ServiceDeleted, &context, target).await?;
    tx.commit().await?;
    Ok(true)
}

async fn create_key(mut tx: impl WriteTransaction, new: NewServiceKey) -> Result<KeyCreation, StoreError> {
    let NewServiceKey { key, secret, most, context } = new;
    if tx.lock_service(key.account).await?.is_none() {
        return Ok(KeyCreation::NoSuchAccount);
    }
    let count = Statement::new("SELECT count(*) FROM service_keys WHERE service_account_id = $1").bind(key.account.0);
    if tx.number(count).await? >= i64::from(most) {
        return Ok(KeyCreation::TooMany);
    }
    let statement = Statement::new(
        "INSERT INTO service_keys (id, service_account_id, description, secret_hash, create_time, expire_time) \
         VALUES ($1, $2, $3, $4, $5, $6)",
    )
    .bind(key.id.0)
    .bind(key.account.0)
    .bind(key.description.as_str())
    .bind(secret.0)
    .bind(key.create_time)
    .bind(key.expire_time);
    tx.run(statement).await?;
    tx.record(Action::ServiceKeyCreated, &context, of_key(key.account, key.id)).await?;
    tx.commit().await?;
    Ok(KeyCreation::Created)
}

async fn delete_key(
    mut tx: impl WriteTransaction,
    account: ServiceAccountId,
    key: ServiceKeyId,
    context: AuditContext,
) -> Result<bool, StoreError> {
    let statement = Statement::new("DELETE FROM service_keys WHERE id = $1 AND service_account_id = $2");
    if !tx.changes_one(statement.bind(key.0).bind(account.0)).await? {
        return Ok(false);
    }
    tx.log_session(key.into(), &context).await?;
    tx.record(Action::ServiceKeyDeleted, &context, of_key(account, key)).await?;
    tx.commit().await?;
    Ok(true)
}

async fn revoke_token(
    mut tx: impl WriteTransaction,
    account: ServiceAccountId,
    token: TokenId,
    context: AuditContext,
) -> Result<(), StoreError> {
    tx.log_session(token.into(), &context).await?;
    let target = AuditTarget::session(UserId::from(account), SessionId::from(token));
    tx.record(Action::ServiceTokenRevoked, &context, target).await?;
    tx.commit().await
}

fn of_key(account: ServiceAccountId, key: ServiceKeyId) -> AuditTarget {
    AuditTarget::session(UserId::from(account), SessionId::from(key))
}
