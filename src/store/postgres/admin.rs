//! Administration, a person's own sessions, and the audit.

use async_trait::async_trait;
use time::OffsetDateTime;

use crate::domain::{
    SessionId, UserId,
    account::User,
    audit::{Action, AuditEvent, Occasion},
    one_time::Purpose,
    role::Role,
    session::SessionSummary,
};

use super::{
    PostgresStore, Time, Tx,
    accounts::user_by_id,
    audit,
    mail::{lock_user, queue, void_tokens},
    sessions::{revoke, revoke_all},
};
use crate::store::{
    About, AdminStore, AuditPage, RevokeReason, StoreError, UserChange, UserDeletion, UserDeletionOutcome, UserOrder,
    UserPage,
    rows::{AuditRow, SessionRow, UserRow, roles_text, user_columns},
    to_the_end,
};

#[async_trait]
impl AdminStore for PostgresStore {
    async fn list_users(&self, page: UserPage) -> Result<Vec<User>, StoreError> {
        let limit = i64::from(page.limit);
        let users = match page.order {
            UserOrder::ById { after: None } => sqlx::query_as::<_, UserRow<Time>>(concat!(
                "SELECT ",
                user_columns!(),
                " FROM users u ORDER BY u.id LIMIT $1"
            ))
            .bind(limit),
            UserOrder::ById { after: Some(after) } => sqlx::query_as::<_, UserRow<Time>>(concat!(
                "SELECT ",
                user_columns!(),
                " FROM users u WHERE u.id > $2 ORDER BY u.id LIMIT $1"
            ))
            .bind(limit)
            .bind(after.0),
            UserOrder::ByEmail { prefix, after } => sqlx::query_as::<_, UserRow<Time>>(concat!(
                "SELECT ",
                user_columns!(),
                " FROM users u WHERE u.email COLLATE \"C\" > $2 AND u.email COLLATE \"C\" >= $3 ",
                "AND u.email COLLATE \"C\" < $4 ORDER BY u.email COLLATE \"C\" LIMIT $1"
            ))
            .bind(limit)
            .bind(after.unwrap_or_default())
            .bind(prefix.clone())
            .bind(end_of(&prefix)),
            UserOrder::ByUsername { prefix, after } => sqlx::query_as::<_, UserRow<Time>>(concat!(
                "SELECT ",
                user_columns!(),
                " FROM users u WHERE lower(u.username) COLLATE \"C\" > $2 AND lower(u.username) COLLATE \"C\" >= $3 ",
                "AND lower(u.username) COLLATE \"C\" < $4 ",
                "AND NOT (u.email COLLATE \"C\" >= $3 AND u.email COLLATE \"C\" < $4) ",
                "ORDER BY lower(u.username) COLLATE \"C\" LIMIT $1"
            ))
            .bind(limit)
            .bind(after.unwrap_or_default())
            .bind(prefix.clone())
            .bind(end_of(&prefix)),
        };
        users.fetch_all(self.pool()?).await?.into_iter().map(UserRow::into_user).collect()
    }

    async fn user(&self, id: UserId) -> Result<Option<User>, StoreError> {
        sqlx::query_as::<_, UserRow<Time>>(concat!("SELECT ", user_columns!(), " FROM users u WHERE u.id = $1"))
            .bind(id.0)
            .fetch_optional(self.pool()?)
            .await?
            .map(UserRow::into_user)
            .transpose()
    }

    async fn set_roles(&self, id: UserId, roles: Vec<Role>, occasion: Occasion) -> Result<UserChange, StoreError> {
        let pool = self.pool()?.clone();
        to_the_end(async move {
            let mut tx = pool.begin().await?;
            let Some(before) = lock_user(&mut tx, id).await? else {
                return Ok(UserChange::NoSuchUser);
            };
            if before.roles == roles {
                return Ok(UserChange::Changed(before));
            }
            let admin = |role: &Role| role.as_str() == Role::ADMIN;
            if !roles.iter().any(admin) && is_last_admin(&mut tx, &before).await? {
                return Ok(UserChange::LastAdmin);
            }
            sqlx::query("DELETE FROM user_roles WHERE user_id = $1").bind(id.0).execute(&mut *tx).await?;
            for role in &roles {
                sqlx::query("INSERT INTO user_roles (user_id, role) VALUES ($1, $2)")
                    .bind(id.0)
                    .bind(role.as_str())
                    .execute(&mut *tx)
                    .await?;
            }
            touch(&mut tx, id, occasion.now).await?;
            audit::roles_changed(&mut tx, id, &roles, &occasion).await?;
            let detail = format!("{} -> {}", roles_text(&before.roles), roles_text(&roles));
            audit::record(&mut tx, Action::RolesChanged, &occasion, About::user(id).detail(detail)).await?;
            let user = user_by_id(&mut tx, id).await?;
            tx.commit().await?;
            Ok(UserChange::Changed(user))
        })
        .await
    }

    async fn disable_user(
        &self,
        id: UserId,
        reason: Option<String>,
        occasion: Occasion,
    ) -> Result<UserChange, StoreError> {
        let pool = self.pool()?.clone();
        to_the_end(async move {
            let mut tx = pool.begin().await?;
            let Some(before) = lock_user(&mut tx, id).await? else {
                return Ok(UserChange::NoSuchUser);
            };
            if before.disabled {
                return Ok(UserChange::Changed(before));
            }
            if is_last_admin(&mut tx, &before).await? {
                return Ok(UserChange::LastAdmin);
            }
            sqlx::query("UPDATE users SET disabled = true WHERE id = $1").bind(id.0).execute(&mut *tx).await?;
            touch(&mut tx, id, occasion.now).await?;
            revoke_all(&mut tx, id, RevokeReason::UserDisabled, &occasion).await?;
            void_tokens(&mut tx, id, &before.email, &[Purpose::ResetPassword, Purpose::ChangeEmail]).await?;
            let about = About { user: Some(id), detail: reason, ..About::default() };
            audit::record(&mut tx, Action::UserDisabled, &occasion, about).await?;
            let user = user_by_id(&mut tx, id).await?;
            tx.commit().await?;
            Ok(UserChange::Changed(user))
        })
        .await
    }

    async fn enable_user(&self, id: UserId, occasion: Occasion) -> Result<UserChange, StoreError> {
        let pool = self.pool()?.clone();
        to_the_end(async move {
            let mut tx = pool.begin().await?;
            let Some(before) = lock_user(&mut tx, id).await? else {
                return Ok(UserChange::NoSuchUser);
            };
            if !before.disabled {
                return Ok(UserChange::Changed(before));
            }
            sqlx::query("UPDATE users SET disabled = false WHERE id = $1").bind(id.0).execute(&mut *tx).await?;
            touch(&mut tx, id, occasion.now).await?;
            audit::record(&mut tx, Action::UserEnabled, &occasion, About::user(id)).await?;
            let user = user_by_id(&mut tx, id).await?;
            tx.commit().await?;
            Ok(UserChange::Changed(user))
        })
        .await
    }

    async fn revoke_user_sessions(&self, id: UserId, occasion: Occasion) -> Result<Option<u64>, StoreError> {
        let pool = self.pool()?.clone();
        to_the_end(async move {
            let mut tx = pool.begin().await?;
            if lock_user(&mut tx, id).await?.is_none() {
                return Ok(None);
            }
            // Those that have expired end too, and are no news to anybody.
            let open: i64 = sqlx::query_scalar(
                "SELECT count(*) FROM sessions WHERE user_id = $1 AND revoke_time IS NULL AND refresh_expire_time > $2",
            )
            .bind(id.0)
            .bind(occasion.now)
            .fetch_one(&mut *tx)
            .await?;
            revoke_all(&mut tx, id, RevokeReason::EndedByAdmin, &occasion).await?;
            audit::record(&mut tx, Action::SessionsRevoked, &occasion, About::user(id)).await?;
            tx.commit().await?;
            Ok(Some(open.unsigned_abs()))
        })
        .await
    }

    async fn delete_user(&self, deletion: UserDeletion) -> Result<UserDeletionOutcome, StoreError> {
        let pool = self.pool()?.clone();
        to_the_end(async move {
            let UserDeletion { user: id, password_version, occasion, notice } = deletion;
            let mut tx = pool.begin().await?;
            let Some(before) = lock_user(&mut tx, id).await? else {
                return Ok(UserDeletionOutcome::NoSuchUser);
            };
            if let Some(version) = password_version {
                let unchanged: bool =
                    sqlx::query_scalar("SELECT password_version = $2 AND NOT disabled FROM users WHERE id = $1")
                        .bind(id.0)
                        .bind(version)
                        .fetch_one(&mut *tx)
                        .await?;
                if !unchanged {
                    return Ok(UserDeletionOutcome::Refused);
                }
            }
            if is_last_admin(&mut tx, &before).await? {
                return Ok(UserDeletionOutcome::LastAdmin);
            }
            // The log of revocations outlives the rows that it is about.
            revoke_all(&mut tx, id, RevokeReason::UserDeleted, &occasion).await?;
            void_tokens(&mut tx, id, &before.email, &Purpose::ALL).await?;
            audit::record(&mut tx, Action::UserDeleted, &occasion, About::user(id)).await?;
            sqlx::query("DELETE FROM users WHERE id = $1").bind(id.0).execute(&mut *tx).await?;
            if let Some(notice) = &notice {
                queue(&mut tx, notice).await?;
            }
            tx.commit().await?;
            Ok(UserDeletionOutcome::Deleted)
        })
        .await
    }

    async fn list_sessions(&self, user: UserId, now: OffsetDateTime) -> Result<Vec<SessionSummary>, StoreError> {
        sqlx::query_as::<_, SessionRow<Time>>(
            "SELECT id, create_time, last_refresh_time, refresh_expire_time, client_ip, user_agent FROM sessions \
             WHERE user_id = $1 AND revoke_time IS NULL AND refresh_expire_time > $2 ORDER BY id DESC",
        )
        .bind(user.0)
        .bind(now)
        .fetch_all(self.pool()?)
        .await?
        .into_iter()
        .map(SessionRow::into_summary)
        .collect()
    }

    async fn revoke_session(&self, session: SessionId, user: UserId, occasion: Occasion) -> Result<bool, StoreError> {
        let pool = self.pool()?.clone();
        to_the_end(async move {
            let mut tx = pool.begin().await?;
            let open = sqlx::query(
                "SELECT id FROM sessions WHERE id = $1 AND user_id = $2 AND revoke_time IS NULL \
                 AND refresh_expire_time > $3 FOR UPDATE",
            )
            .bind(session.0)
            .bind(user.0)
            .bind(occasion.now)
            .fetch_optional(&mut *tx)
            .await?;
            if open.is_none() {
                return Ok(false);
            }
            revoke(&mut tx, session, RevokeReason::EndedByOwner, &occasion).await?;
            let about = About::session(user, session);
            audit::record(&mut tx, Action::SessionRevoked, &occasion, about).await?;
            tx.commit().await?;
            Ok(true)
        })
        .await
    }

    async fn list_audit_events(&self, page: AuditPage) -> Result<Vec<AuditEvent>, StoreError> {
        let limit = i64::from(page.limit);
        // Ids begin with the time, so this one is younger than any.
        let before = page.before.map_or(uuid::Uuid::max(), |id| id.0);
        let action = page.action.map(Action::as_str);
        let events = match (page.user, action) {
            (None, None) => sqlx::query_as::<_, AuditRow<Time>>(
                "SELECT id, create_time, action, actor_id, user_id, session_id, client_ip, detail FROM audit_events \
                 WHERE id < $2 ORDER BY id DESC LIMIT $1",
            )
            .bind(limit)
            .bind(before),
            (Some(user), None) => sqlx::query_as::<_, AuditRow<Time>>(
                "SELECT id, create_time, action, actor_id, user_id, session_id, client_ip, detail FROM audit_events \
                 WHERE id < $2 AND user_id = $3 ORDER BY id DESC LIMIT $1",
            )
            .bind(limit)
            .bind(before)
            .bind(user.0),
            (None, Some(action)) => sqlx::query_as::<_, AuditRow<Time>>(
                "SELECT id, create_time, action, actor_id, user_id, session_id, client_ip, detail FROM audit_events \
                 WHERE id < $2 AND action = $3 ORDER BY id DESC LIMIT $1",
            )
            .bind(limit)
            .bind(before)
            .bind(action),
            (Some(user), Some(action)) => sqlx::query_as::<_, AuditRow<Time>>(
                "SELECT id, create_time, action, actor_id, user_id, session_id, client_ip, detail FROM audit_events \
                 WHERE id < $2 AND user_id = $3 AND action = $4 ORDER BY id DESC LIMIT $1",
            )
            .bind(limit)
            .bind(before)
            .bind(user.0)
            .bind(action),
        };
        events.fetch_all(self.pool()?).await?.into_iter().map(AuditRow::into_event).collect()
    }

    async fn forget_audit_events(&self, before: OffsetDateTime, limit: u32) -> Result<u64, StoreError> {
        let pool = self.pool()?.clone();
        to_the_end(async move {
            let deleted = sqlx::query(
                "DELETE FROM audit_events WHERE id IN (SELECT id FROM audit_events WHERE create_time < $1 \
                 ORDER BY create_time LIMIT $2 FOR UPDATE SKIP LOCKED)",
            )
            .bind(before)
            .bind(i64::from(limit))
            .execute(&pool)
            .await?;
            Ok(deleted.rows_affected())
        })
        .await
    }
}

/// Where the texts end that begin with a prefix: U+10FFFF sorts after every other character.
fn end_of(prefix: &str) -> String {
    format!("{prefix}\u{10ffff}")
}

async fn touch(tx: &mut Tx, id: UserId, now: OffsetDateTime) -> Result<(), StoreError> {
    sqlx::query("UPDATE users SET update_time = $2 WHERE id = $1").bind(id.0).bind(now).execute(&mut **tx).await?;
    Ok(())
}

/// Whether no enabled admin would be left without this one. Holds every admin's row until the step ends, so that of two
/// such steps the second looks when the first is done: hence a second look, after the locks.
async fn is_last_admin(tx: &mut Tx, user: &User) -> Result<bool, StoreError> {
    if user.disabled || !user.roles.iter().any(|role| role.as_str() == Role::ADMIN) {
        return Ok(false);
    }
    sqlx::query("SELECT user_id FROM user_roles WHERE role = 'admin' ORDER BY user_id FOR UPDATE")
        .execute(&mut **tx)
        .await?;
    let another: bool = sqlx::query_scalar(
        "SELECT EXISTS (SELECT 1 FROM user_roles r JOIN users u ON u.id = r.user_id \
         WHERE r.role = 'admin' AND NOT u.disabled AND u.id <> $1)",
    )
    .bind(user.id.0)
    .fetch_one(&mut **tx)
    .await?;
    Ok(!another)
}
