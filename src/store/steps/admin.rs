//! The steps of administration, and of a person's own sessions.

use async_trait::async_trait;

use crate::{
    domain::{
        account::User,
        audit::{Action, AuditContext, AuditTarget},
        ids::{SessionId, UserId},
        one_time::Purpose,
        ports::{AdminStore, UserChange, UserDeletion, UserDeletionOutcome},
        role::Role,
        session::RevokeReason,
    },
    error::StoreError,
    store::rows::roles_text,
};

use super::{
    mail::void_tokens,
    transaction::{Backend, WriteTransaction, write},
};

#[async_trait]
impl<B: Backend> AdminStore for B {
    async fn set_roles(&self, user: UserId, roles: Vec<Role>, context: AuditContext) -> Result<UserChange, StoreError> {
        write(self, move |tx| set_roles(tx, user, roles, context)).await
    }

    async fn disable_user(
        &self,
        user: UserId,
        reason: Option<String>,
        context: AuditContext,
    ) -> Result<UserChange, StoreError> {
        write(self, move |tx| disable_user(tx, user, reason, context)).await
    }

    async fn enable_user(&self, user: UserId, context: AuditContext) -> Result<UserChange, StoreError> {
        write(self, move |tx| enable_user(tx, user, context)).await
    }

    async fn revoke_user_sessions(&self, user: UserId, context: AuditContext) -> Result<Option<u64>, StoreError> {
        write(self, move |tx| revoke_user_sessions(tx, user, context)).await
    }

    async fn delete_user(&self, deletion: UserDeletion) -> Result<UserDeletionOutcome, StoreError> {
        write(self, |tx| delete_user(tx, deletion)).await
    }

    async fn revoke_session(
        &self,
        session: SessionId,
        user: UserId,
        context: AuditContext,
    ) -> Result<bool, StoreError> {
        write(self, move |tx| revoke_session(tx, session, user, context)).await
    }
}

async fn set_roles(
    mut tx: impl WriteTransaction,
    id: UserId,
    roles: Vec<Role>,
    context: AuditContext,
) -> Result<UserChange, StoreError> {
    let Some(before) = tx.lock_user(id).await? else {
        return Ok(UserChange::NoSuchUser);
    };
    if before.roles == roles {
        return Ok(UserChange::Changed(before));
    }
    if !contains_admin(&roles) && is_last_admin(&mut tx, &before).await? {
        return Ok(UserChange::LastAdmin);
    }
    let user = replace_roles(&mut tx, &before, &roles, &context).await?;
    tx.commit().await?;
    Ok(UserChange::Changed(user))
}

/// Gives an account, which the caller has locked, other roles. Returns it as it is then.
pub(super) async fn replace_roles<T: WriteTransaction>(
    tx: &mut T,
    before: &User,
    roles: &[Role],
    context: &AuditContext,
) -> Result<User, StoreError> {
    let id = before.id;
    tx.remove_roles(id).await?;
    for role in roles {
        tx.add_role(id, role).await?;
    }
    tx.touch(id, context.now).await?;
    tx.log_roles(id, roles, context).await?;
    let detail = format!("{} -> {}", roles_text(&before.roles), roles_text(roles));
    tx.record(Action::RolesChanged, context, AuditTarget::user(id).detail(detail)).await?;
    tx.user(id).await
}

async fn disable_user(
    mut tx: impl WriteTransaction,
    id: UserId,
    reason: Option<String>,
    context: AuditContext,
) -> Result<UserChange, StoreError> {
    let Some(before) = tx.lock_user(id).await? else {
        return Ok(UserChange::NoSuchUser);
    };
    if before.disabled {
        return Ok(UserChange::Changed(before));
    }
    if is_last_admin(&mut tx, &before).await? {
        return Ok(UserChange::LastAdmin);
    }
    tx.set_disabled(id, true, context.now).await?;
    tx.revoke_all(id, RevokeReason::UserDisabled, &context).await?;
    tx.log_roles(id, &[], &context).await?;
    void_tokens(&mut tx, id, &before.email, &[Purpose::ResetPassword, Purpose::ChangeEmail]).await?;
    let target = AuditTarget { detail: reason, ..AuditTarget::user(id) };
    tx.record(Action::UserDisabled, &context, target).await?;
    let user = tx.user(id).await?;
    tx.commit().await?;
    Ok(UserChange::Changed(user))
}

async fn enable_user(
    mut tx: impl WriteTransaction,
    id: UserId,
    context: AuditContext,
) -> Result<UserChange, StoreError> {
    let Some(before) = tx.lock_user(id).await? else {
        return Ok(UserChange::NoSuchUser);
    };
    if !before.disabled {
        return Ok(UserChange::Changed(before));
    }
    tx.set_disabled(id, false, context.now).await?;
    tx.log_roles(id, &before.roles, &context).await?;
    tx.record(Action::UserEnabled, &context, AuditTarget::user(id)).await?;
    let user = tx.user(id).await?;
    tx.commit().await?;
    Ok(UserChange::Changed(user))
}

async fn revoke_user_sessions(
    mut tx: impl WriteTransaction,
    id: UserId,
    context: AuditContext,
) -> Result<Option<u64>, StoreError> {
    if tx.lock_user(id).await?.is_none() {
        return Ok(None);
    }
    // Sessions that have expired end too, but are not counted: they were over already.
    let open = tx.count_open_sessions(id, context.now).await?;
    tx.revoke_all(id, RevokeReason::EndedByAdmin, &context).await?;
    tx.record(Action::SessionsRevoked, &context, AuditTarget::user(id)).await?;
    tx.commit().await?;
    Ok(Some(open))
}

async fn delete_user(mut tx: impl WriteTransaction, deletion: UserDeletion) -> Result<UserDeletionOutcome, StoreError> {
    let UserDeletion { user: id, password_version, context } = deletion;
    let Some(before) = tx.lock_user(id).await? else {
        return Ok(UserDeletionOutcome::NoSuchUser);
    };
    if let Some(version) = password_version
        && !tx.lock_enabled_user(id, version).await?
    {
        return Ok(UserDeletionOutcome::Refused);
    }
    if is_last_admin(&mut tx, &before).await? {
        return Ok(UserDeletionOutcome::LastAdmin);
    }
    erase_user(&mut tx, &before, &context, AuditTarget::user(id)).await?;
    tx.commit().await?;
    Ok(UserDeletionOutcome::Deleted)
}

/// Deletes an account, which the caller has locked, and ends its sessions and tokens.
pub(super) async fn erase_user<T: WriteTransaction>(
    tx: &mut T,
    user: &User,
    context: &AuditContext,
    target: AuditTarget,
) -> Result<(), StoreError> {
    // The log of revocations outlives the rows that it is about.
    tx.revoke_all(user.id, RevokeReason::UserDeleted, context).await?;
    tx.log_roles(user.id, &[], context).await?;
    void_tokens(tx, user.id, &user.email, &Purpose::ALL).await?;
    tx.record(Action::UserDeleted, context, target).await?;
    tx.delete_user(user.id).await
}

async fn revoke_session(
    mut tx: impl WriteTransaction,
    session: SessionId,
    user: UserId,
    context: AuditContext,
) -> Result<bool, StoreError> {
    if !tx.lock_open_session(session, user, context.now).await? {
        return Ok(false);
    }
    tx.revoke(session, RevokeReason::EndedByOwner, &context).await?;
    tx.record(Action::SessionRevoked, &context, AuditTarget::session(user, session)).await?;
    tx.commit().await?;
    Ok(true)
}

fn contains_admin(roles: &[Role]) -> bool {
    roles.iter().any(|role| role.as_str() == Role::ADMIN)
}

/// Whether no enabled admin would be left without this account.
async fn is_last_admin<T: WriteTransaction>(tx: &mut T, user: &User) -> Result<bool, StoreError> {
    Ok(!user.disabled && contains_admin(&user.roles) && !tx.is_another_admin_enabled(user.id).await?)
}
