//! Accounts.

use async_trait::async_trait;

use crate::domain::{
    SessionId, UserId,
    account::{Email, User},
    audit::{Action, Occasion},
    mail::{MailKind, NewMail},
    one_time::{OneTimeGrant, Purpose},
};

use super::{
    PostgresStore, Time, Tx, audit,
    mail::{lock_user, queue, queue_within, use_up, void_tokens},
    sessions::{forgive, insert_session, revoke_all},
};
use crate::store::{
    About, AccountCreation, AccountStore, Credentials, EmailChange, EmailChangeRequest, EmailConfirmation,
    EmailConfirmationOutcome, Enqueued, NewAccount, PasswordChange, PasswordReset, PasswordResetOutcome, RevokeReason,
    SessionOpening, StoreError,
    rows::{CredentialsRow, UserRow, user_columns},
    to_the_end,
};

#[async_trait]
impl AccountStore for PostgresStore {
    async fn create_account(&self, account: NewAccount) -> Result<AccountCreation, StoreError> {
        let pool = self.pool()?.clone();
        to_the_end(async move {
            let mut tx = pool.begin().await?;
            // Waits for a sign-up of the same address or name that has not committed yet.
            let created = sqlx::query(
                "INSERT INTO users (id, username, email, password_hash, create_time, update_time) \
                 VALUES ($1, $2, $3, $4, $5, $5) ON CONFLICT DO NOTHING",
            )
            .bind(account.id.0)
            .bind(account.username.as_str())
            .bind(account.email.as_str())
            .bind(account.password_hash.as_str())
            .bind(account.occasion.now)
            .execute(&mut *tx)
            .await?
            .rows_affected();
            if created == 0 {
                let outcome = why_not_created(&mut tx, &account).await?;
                tx.commit().await?;
                return Ok(outcome);
            }
            sqlx::query("INSERT INTO user_roles (user_id, role) VALUES ($1, 'user')")
                .bind(account.id.0)
                .execute(&mut *tx)
                .await?;
            queue_within(&mut tx, &account.verification, account.limit).await?;
            audit::record(&mut tx, Action::SignUp, &account.occasion, About::user(account.id)).await?;
            let user = user_by_id(&mut tx, account.id).await?;
            tx.commit().await?;
            Ok(AccountCreation::Created(user))
        })
        .await
    }

    async fn credentials(&self, email: &Email) -> Result<Option<Credentials>, StoreError> {
        sqlx::query_as::<_, CredentialsRow<Time>>(concat!(
            "SELECT ",
            user_columns!(),
            ", u.password_hash, u.password_version FROM users u WHERE u.email = $1"
        ))
        .bind(email.as_str())
        .fetch_optional(self.pool()?)
        .await?
        .map(CredentialsRow::into_credentials)
        .transpose()
    }

    async fn credentials_of_session(
        &self,
        session: SessionId,
        user: UserId,
    ) -> Result<Option<Credentials>, StoreError> {
        sqlx::query_as::<_, CredentialsRow<Time>>(concat!(
            "SELECT ",
            user_columns!(),
            ", u.password_hash, u.password_version FROM users u JOIN sessions s ON s.user_id = u.id ",
            "WHERE s.id = $1 AND u.id = $2 AND s.revoke_time IS NULL AND NOT u.disabled"
        ))
        .bind(session.0)
        .bind(user.0)
        .fetch_optional(self.pool()?)
        .await?
        .map(CredentialsRow::into_credentials)
        .transpose()
    }

    async fn user_of_session(&self, session: SessionId, user: UserId) -> Result<Option<User>, StoreError> {
        sqlx::query_as::<_, UserRow<Time>>(concat!(
            "SELECT ",
            user_columns!(),
            " FROM users u JOIN sessions s ON s.user_id = u.id ",
            "WHERE s.id = $1 AND u.id = $2 AND s.revoke_time IS NULL AND NOT u.disabled"
        ))
        .bind(session.0)
        .bind(user.0)
        .fetch_optional(self.pool()?)
        .await?
        .map(UserRow::into_user)
        .transpose()
    }

    async fn verify_email(&self, token: OneTimeGrant, occasion: Occasion) -> Result<Option<User>, StoreError> {
        let pool = self.pool()?.clone();
        to_the_end(async move {
            let mut tx = pool.begin().await?;
            let verified =
                sqlx::query("UPDATE users SET email_verified = true, update_time = $3 WHERE id = $1 AND email = $2")
                    .bind(token.user_id.0)
                    .bind(token.email.as_str())
                    .bind(occasion.now)
                    .execute(&mut *tx)
                    .await?
                    .rows_affected();
            if verified == 0 || !use_up(&mut tx, Purpose::VerifyEmail, &token, occasion.now).await? {
                return Ok(None);
            }
            void_tokens(&mut tx, token.user_id, &token.email, &[Purpose::VerifyEmail]).await?;
            let occasion = occasion.by(token.user_id);
            audit::record(&mut tx, Action::EmailVerified, &occasion, About::user(token.user_id)).await?;
            let user = user_by_id(&mut tx, token.user_id).await?;
            tx.commit().await?;
            Ok(Some(user))
        })
        .await
    }

    async fn reset_password(&self, reset: PasswordReset) -> Result<PasswordResetOutcome, StoreError> {
        let pool = self.pool()?.clone();
        to_the_end(async move {
            let mut tx = pool.begin().await?;
            // First the user, then the rest: see `logout`.
            let changed = sqlx::query(
                "UPDATE users SET password_hash = $3, password_version = password_version + 1, email_verified = true, \
                 update_time = $4 WHERE id = $1 AND email = $2 AND NOT disabled",
            )
            .bind(reset.token.user_id.0)
            .bind(reset.token.email.as_str())
            .bind(reset.password_hash.as_str())
            .bind(reset.occasion.now)
            .execute(&mut *tx)
            .await?
            .rows_affected();
            if changed == 0 || !use_up(&mut tx, Purpose::ResetPassword, &reset.token, reset.occasion.now).await? {
                return Ok(PasswordResetOutcome::TokenDead);
            }
            let (id, occasion) = (reset.token.user_id, reset.occasion.by(reset.token.user_id));
            revoke_all(&mut tx, id, RevokeReason::PasswordReset, &occasion).await?;
            forgive(&mut tx, reset.attempts).await?;
            audit::record(&mut tx, Action::PasswordReset, &occasion, About::user(id)).await?;
            void_tokens(&mut tx, id, &reset.token.email, &Purpose::ALL).await?;
            queue(&mut tx, &reset.notice).await?;
            tx.commit().await?;
            Ok(PasswordResetOutcome::Reset)
        })
        .await
    }

    async fn change_password(&self, change: PasswordChange) -> Result<SessionOpening, StoreError> {
        let pool = self.pool()?.clone();
        to_the_end(async move {
            let (id, occasion) = (change.session.grant.user_id, change.session.occasion);
            let mut tx = pool.begin().await?;
            let changed = sqlx::query(
                "UPDATE users SET password_hash = $3, password_version = password_version + 1, update_time = $4 \
                 WHERE id = $1 AND password_version = $2 AND NOT disabled",
            )
            .bind(id.0)
            .bind(change.session.password_version)
            .bind(change.password_hash.as_str())
            .bind(occasion.now)
            .execute(&mut *tx)
            .await?
            .rows_affected();
            if changed == 0 {
                return Ok(SessionOpening::Refused);
            }
            revoke_all(&mut tx, id, RevokeReason::PasswordChanged, &occasion).await?;
            let about = About::session(id, change.session.grant.session_id);
            insert_session(&mut tx, change.session).await?;
            audit::record(&mut tx, Action::PasswordChanged, &occasion, about).await?;
            let user = user_by_id(&mut tx, id).await?;
            void_tokens(&mut tx, id, &user.email, &[Purpose::ResetPassword, Purpose::ChangeEmail]).await?;
            queue(&mut tx, &change.notice).await?;
            tx.commit().await?;
            Ok(SessionOpening::Opened(user))
        })
        .await
    }

    async fn request_email_change(&self, change: EmailChange) -> Result<EmailChangeRequest, StoreError> {
        let pool = self.pool()?.clone();
        to_the_end(async move {
            let mut tx = pool.begin().await?;
            let unchanged = sqlx::query(
                "SELECT u.id FROM users u WHERE u.id = $1 AND u.password_version = $2 AND NOT u.disabled \
                 FOR NO KEY UPDATE",
            )
            .bind(change.user_id.0)
            .bind(change.password_version)
            .fetch_optional(&mut *tx)
            .await?;
            if unchanged.is_none() {
                return Ok(EmailChangeRequest::Refused);
            }
            let taken = email_taken(&mut tx, &change.confirmation.recipient).await?;
            let mail = match (taken, change.concealed.as_ref()) {
                (false, _) => &change.confirmation,
                (true, Some(to_its_owner)) => to_its_owner,
                (true, None) => return Ok(EmailChangeRequest::EmailTaken),
            };
            if queue_within(&mut tx, mail, change.limit).await? == Enqueued::OverLimit {
                return Ok(EmailChangeRequest::OverLimit);
            }
            queue(&mut tx, &change.notice).await?;
            audit::record(&mut tx, Action::EmailChangeRequested, &change.occasion, About::user(change.user_id)).await?;
            tx.commit().await?;
            Ok(EmailChangeRequest::Requested)
        })
        .await
    }

    async fn confirm_email_change(
        &self,
        confirmation: EmailConfirmation,
    ) -> Result<EmailConfirmationOutcome, StoreError> {
        let pool = self.pool()?.clone();
        to_the_end(async move {
            let EmailConfirmation { token, notice, occasion } = confirmation;
            let (now, occasion) = (occasion.now, occasion.by(token.user_id));
            let mut tx = pool.begin().await?;
            let Some(before) = lock_user(&mut tx, token.user_id).await?.filter(|user| !user.disabled) else {
                return Ok(EmailConfirmationOutcome::TokenDead);
            };
            if !use_up(&mut tx, Purpose::ChangeEmail, &token, now).await? {
                return Ok(EmailConfirmationOutcome::TokenDead);
            }
            if email_taken(&mut tx, &token.email).await? {
                return Ok(EmailConfirmationOutcome::EmailTaken);
            }
            let changed =
                sqlx::query("UPDATE users SET email = $2, email_verified = true, update_time = $3 WHERE id = $1")
                    .bind(token.user_id.0)
                    .bind(token.email.as_str())
                    .bind(now)
                    .execute(&mut *tx)
                    .await;
            match changed {
                // Somebody else took it between the look and the step; the token is as it was.
                Err(sqlx::Error::Database(error)) if error.is_unique_violation() => {
                    return Ok(EmailConfirmationOutcome::EmailTaken);
                }
                outcome => outcome?,
            };
            void_tokens(&mut tx, token.user_id, &before.email, &Purpose::ALL).await?;
            let notice = NewMail {
                id: notice,
                kind: MailKind::EmailChanged,
                recipient: before.email,
                user_id: Some(token.user_id),
                new_email: Some(token.email),
                create_time: now,
            };
            queue(&mut tx, &notice).await?;
            audit::record(&mut tx, Action::EmailChanged, &occasion, About::user(token.user_id)).await?;
            let user = user_by_id(&mut tx, token.user_id).await?;
            tx.commit().await?;
            Ok(EmailConfirmationOutcome::Changed(user))
        })
        .await
    }
}

/// What was in the way of a new account; its owner is mailed where nobody else is to know.
async fn why_not_created(tx: &mut Tx, account: &NewAccount) -> Result<AccountCreation, StoreError> {
    let email_taken = email_taken(tx, &account.email).await?;
    let Some(to_its_owner) = &account.concealed else {
        return Ok(if email_taken { AccountCreation::EmailTaken } else { AccountCreation::UsernameTaken });
    };
    let username_taken: bool =
        sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM users WHERE lower(username) = lower($1))")
            .bind(account.username.as_str())
            .fetch_one(&mut **tx)
            .await?;
    if username_taken {
        return Ok(AccountCreation::UsernameTaken);
    }
    queue_within(tx, to_its_owner, account.limit).await?;
    Ok(AccountCreation::EmailTaken)
}

async fn email_taken(tx: &mut Tx, email: &Email) -> Result<bool, StoreError> {
    Ok(sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM users WHERE email = $1)")
        .bind(email.as_str())
        .fetch_one(&mut **tx)
        .await?)
}

pub(super) async fn user_by_id(tx: &mut Tx, id: UserId) -> Result<User, StoreError> {
    sqlx::query_as::<_, UserRow<Time>>(concat!("SELECT ", user_columns!(), " FROM users u WHERE u.id = $1"))
        .bind(id.0)
        .fetch_one(&mut **tx)
        .await?
        .into_user()
}
