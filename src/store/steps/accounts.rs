//! The steps that create and change accounts.

use async_trait::async_trait;
use time::OffsetDateTime;

use crate::{
    domain::{
        account::{Email, User},
        audit::{Action, AuditTarget},
        ids::{SessionId, UserId},
        mail::{MailKind, NewMail},
        one_time::Purpose,
        ports::{
            AccountCreation, AccountStore, EmailChange, EmailChangeRequest, EmailConfirmation,
            EmailConfirmationOutcome, EmailVerification, Enqueued, NewAccount, PasswordChange, PasswordReset,
            PasswordResetOutcome, SessionOpening, UsernameChange, UsernameChangeOutcome,
        },
        role::Role,
        session::RevokeReason,
        throttle::AddressLimit,
    },
    error::StoreError,
    store::statement::Statement,
    trace::TraceParent,
};

use super::{
    admin::{erase_user, replace_roles},
    mail::{consume_token, queue_within, void_mails, void_tokens},
    transaction::{Backend, Budget, WriteTransaction, write},
};

#[async_trait]
impl<B: Backend> AccountStore for B {
    async fn create_account(&self, account: NewAccount) -> Result<AccountCreation, StoreError> {
        Backend::create_account(self, account).await
    }

    async fn verify_email(&self, verification: EmailVerification) -> Result<Option<User>, StoreError> {
        write(self, |tx| verify_email(tx, verification)).await
    }

    async fn reset_password(&self, reset: PasswordReset) -> Result<PasswordResetOutcome, StoreError> {
        write(self, |tx| reset_password(tx, reset)).await
    }

    async fn change_password(&self, change: PasswordChange) -> Result<SessionOpening, StoreError> {
        write(self, |tx| change_password(tx, change)).await
    }

    async fn request_email_change(&self, change: EmailChange) -> Result<EmailChangeRequest, StoreError> {
        write(self, |tx| request_email_change(tx, change)).await
    }

    async fn confirm_email_change(
        &self,
        confirmation: EmailConfirmation,
    ) -> Result<EmailConfirmationOutcome, StoreError> {
        write(self, |tx| confirm_email_change(tx, confirmation)).await
    }

    async fn change_username(&self, change: UsernameChange) -> Result<UsernameChangeOutcome, StoreError> {
        write(self, |tx| change_username(tx, change)).await
    }
}

pub(in crate::store) async fn create_account(
    mut tx: impl WriteTransaction,
    account: NewAccount,
) -> Result<AccountCreation, StoreError> {
    // Waits for a sign-up with the same address or username that has not committed yet.
    if !tx.insert_user(&account).await? {
        let outcome = why_not_created(&mut tx, &account).await?;
        tx.commit().await?;
        return Ok(outcome);
    }
    tx.add_role(account.id, &Role::user()).await?;
    let mut target = AuditTarget::user(account.id);
    if account.email_verified {
        tx.run(Statement::new("UPDATE users SET email_verified = TRUE WHERE id = $1").bind(account.id.0)).await?;
        target = target.detail("an operator vouches for the address".to_owned());
    } else if !account.withholds_mail {
        queue_within(&mut tx, &account.verification, account.limit).await?;
    }
    tx.record(Action::SignUp, &account.context, target).await?;
    let mut user = tx.user(account.id).await?;
    if let Some((roles, context)) = account.roles.filter(|(roles, _)| *roles != user.roles) {
        user = replace_roles(&mut tx, &user, &roles, &context).await?;
    }
    tx.commit().await?;
    Ok(AccountCreation::Created(user))
}

/// What was in the way of a new account. Where the caller must not learn that the address is taken, its owner is
/// mailed.
async fn why_not_created<T: WriteTransaction>(tx: &mut T, account: &NewAccount) -> Result<AccountCreation, StoreError> {
    let Some(owner_notice) = &account.owner_notice else {
        let email_taken = tx.is_email_taken(&account.email).await?;
        return Ok(if email_taken { AccountCreation::EmailTaken } else { AccountCreation::UsernameTaken });
    };
    if tx.is_username_taken(&account.username).await? {
        return Ok(AccountCreation::UsernameTaken);
    }
    if !account.withholds_mail {
        queue_within(tx, owner_notice, account.limit).await?;
    }
    Ok(AccountCreation::EmailTaken)
}

async fn verify_email(
    mut tx: impl WriteTransaction,
    verification: EmailVerification,
) -> Result<Option<User>, StoreError> {
    let EmailVerification { token, session, no_password, context } = verification;
    // Of two callers at the same time, one marks it. The token stays: it tells whoever opens the link again that it has
    // worked, and no other can be made for an address that is verified.
    if token.purpose != Purpose::VerifyEmail
        || !tx.mark_email_verified(&token, context.now).await?
        || !tx.lock_token(&token, context.now).await?
    {
        return Ok(None);
    }
    let (id, context) = (token.user_id, context.by(token.user_id));
    void_mails(&mut tx, id, &token.email, Purpose::VerifyEmail).await?;
    let mut target = AuditTarget::user(id);
    if !is_open(&mut tx, session, id, context.now).await? {
        // Whoever reads the mail may not be who signed up. See decision 0033.
        tx.revoke_all(id, RevokeReason::EmailVerified, &context).await?;
        if tx.is_email_change_pending(id).await? {
            tx.set_password(id, &no_password, context.now).await?;
            void_tokens(&mut tx, id, &token.email, &[Purpose::ChangeEmail]).await?;
            target = target.detail("a change of address was pending; it and the password ended".to_owned());
        }
    }
    tx.record(Action::EmailVerified, &context, target).await?;
    let user = tx.user(id).await?;
    tx.commit().await?;
    Ok(Some(user))
}

/// Whether this is an open session of the user.
async fn is_open<T: WriteTransaction>(
    tx: &mut T,
    session: Option<SessionId>,
    user: UserId,
    now: OffsetDateTime,
) -> Result<bool, StoreError> {
    match session {
        Some(session) => tx.lock_open_session(session, user, now).await,
        None => Ok(false),
    }
}

async fn reset_password(
    mut tx: impl WriteTransaction,
    reset: PasswordReset,
) -> Result<PasswordResetOutcome, StoreError> {
    let PasswordReset { token, password_hash, notice, attempts, context } = reset;
    if !tx.reset_password(&token, &password_hash, context.now).await?
        || !consume_token(&mut tx, Purpose::ResetPassword, &token, context.now).await?
    {
        return Ok(PasswordResetOutcome::TokenDead);
    }
    let (id, context) = (token.user_id, context.by(token.user_id));
    tx.revoke_all(id, RevokeReason::PasswordReset, &context).await?;
    tx.reset_attempts(attempts).await?;
    tx.record(Action::PasswordReset, &context, AuditTarget::user(id)).await?;
    void_tokens(&mut tx, id, &token.email, &Purpose::ALL).await?;
    tx.queue(&notice).await?;
    tx.commit().await?;
    Ok(PasswordResetOutcome::Reset)
}

/// Whether a session was ended, by a logout for example.
async fn has_ended<T: WriteTransaction>(tx: &mut T, session: SessionId) -> Result<bool, StoreError> {
    tx.finds(Statement::new("SELECT id FROM sessions WHERE id = $1 AND revoke_time IS NOT NULL").bind(session.0)).await
}

async fn change_password(mut tx: impl WriteTransaction, change: PasswordChange) -> Result<SessionOpening, StoreError> {
    let PasswordChange { password_hash, caller, session, notice, limit } = change;
    let (id, context) = (session.grant.user_id, session.context);
    if !tx.replace_password(id, session.password_version, &password_hash, context.now).await? {
        return Ok(SessionOpening::Refused);
    }
    // A logout everywhere locks the account too. If it came first, nothing may open a session for its caller.
    if has_ended(&mut tx, caller).await? {
        return Ok(SessionOpening::Refused);
    }
    tx.revoke_all(id, RevokeReason::PasswordChanged, &context).await?;
    let target = AuditTarget::session(id, session.grant.session_id);
    tx.insert_session(session).await?;
    tx.record(Action::PasswordChanged, &context, target).await?;
    let user = tx.user(id).await?;
    void_tokens(&mut tx, id, &user.email, &[Purpose::ResetPassword, Purpose::ChangeEmail]).await?;
    queue_notice(&mut tx, &notice, &user, limit).await?;
    tx.commit().await?;
    Ok(SessionOpening::Opened(user))
}

/// Queues a notice about an account to its address. Nobody may suppress it by asking for mails. An address that is not
/// verified may belong to somebody else, to whom these mails are unwanted: it gets so many of them at once, and no more.
async fn queue_notice<T: WriteTransaction>(
    tx: &mut T,
    notice: &NewMail,
    user: &User,
    limit: AddressLimit,
) -> Result<(), StoreError> {
    if user.email_verified || tx.count_mail(Budget::Notices, notice, limit, limit.furthest()).await? {
        tx.queue(notice).await?;
    }
    Ok(())
}

async fn request_email_change(
    mut tx: impl WriteTransaction,
    change: EmailChange,
) -> Result<EmailChangeRequest, StoreError> {
    if !tx.lock_enabled_user(change.user_id, change.password_version).await?
        || has_ended(&mut tx, change.caller).await?
    {
        return Ok(EmailChangeRequest::Refused);
    }
    // Whoever can confirm the change has read a mail to the address. Only an account whose owner has too keeps it.
    let holder = tx.holder_of(&change.confirmation.recipient).await?;
    let taken = holder.is_some_and(|holder| !holder.yields_address());
    let mail = match (taken, &change.owner_notice) {
        (false, _) => &change.confirmation,
        (true, Some(owner_notice)) => owner_notice,
        (true, None) => return Ok(EmailChangeRequest::EmailTaken),
    };
    if queue_within(&mut tx, mail, change.limit).await? == Enqueued::OverLimit {
        return Ok(EmailChangeRequest::OverLimit);
    }
    let user = tx.user(change.user_id).await?;
    queue_notice(&mut tx, &change.notice, &user, change.limit).await?;
    tx.record(Action::EmailChangeRequested, &change.context, AuditTarget::user(change.user_id)).await?;
    tx.commit().await?;
    Ok(EmailChangeRequest::Requested)
}

async fn confirm_email_change(
    mut tx: impl WriteTransaction,
    confirmation: EmailConfirmation,
) -> Result<EmailConfirmationOutcome, StoreError> {
    let EmailConfirmation { token, notice, context, eviction } = confirmation;
    let (id, now, context) = (token.user_id, context.now, context.by(token.user_id));
    let (before, holder) = lock_with_holder(&mut tx, id, &token.email).await?;
    let Some(before) = before.filter(|user| !user.disabled) else {
        return Ok(EmailConfirmationOutcome::TokenDead);
    };
    if !consume_token(&mut tx, Purpose::ChangeEmail, &token, now).await? {
        return Ok(EmailConfirmationOutcome::TokenDead);
    }
    // Without a commit the token stays live.
    if let Some(holder) = holder {
        if !holder.yields_address() {
            return Ok(EmailConfirmationOutcome::EmailTaken);
        }
        let target = AuditTarget::user(holder.id).detail("another account has verified its address".to_owned());
        erase_user(&mut tx, &holder, &eviction.by(id), target).await?;
    }
    // A sign-up can take the address after `lock_with_holder` has looked.
    if !tx.set_email(id, &token.email, now).await? {
        return Ok(EmailConfirmationOutcome::EmailTaken);
    }
    void_tokens(&mut tx, id, &before.email, &Purpose::ALL).await?;
    let notice = NewMail {
        id: notice,
        kind: MailKind::EmailChanged,
        recipient: before.email,
        user_id: Some(id),
        new_email: Some(token.email),
        create_time: now,
        trace: TraceParent::current(),
    };
    tx.queue(&notice).await?;
    tx.record(Action::EmailChanged, &context, AuditTarget::user(id)).await?;
    let user = tx.user(id).await?;
    tx.commit().await?;
    Ok(EmailConfirmationOutcome::Changed(user))
}

/// Locks an account and another one that has this address, in the order of their ids: of two accounts that each confirm
/// the address of the other, none waits for a lock that the other holds.
async fn lock_with_holder<T: WriteTransaction>(
    tx: &mut T,
    id: UserId,
    email: &Email,
) -> Result<(Option<User>, Option<User>), StoreError> {
    let Some(holder) = tx.holder_of(email).await?.map(|user| user.id).filter(|holder| *holder != id) else {
        return Ok((tx.lock_user(id).await?, None));
    };
    let first = tx.lock_user(id.min(holder)).await?;
    let second = tx.lock_user(id.max(holder)).await?;
    let (user, holder) = if id < holder { (first, second) } else { (second, first) };
    // It may have changed its address before it was locked.
    Ok((user, holder.filter(|holder| holder.email == *email)))
}

async fn change_username(
    mut tx: impl WriteTransaction,
    change: UsernameChange,
) -> Result<UsernameChangeOutcome, StoreError> {
    let UsernameChange { user_id: id, caller, password_version, username, context } = change;
    if !tx.lock_enabled_user(id, password_version).await? || has_ended(&mut tx, caller).await? {
        return Ok(UsernameChangeOutcome::Refused);
    }
    // Its own name in another case is free for it. Another account can take the name between the two.
    let own = tx.user(id).await?.username.as_str().eq_ignore_ascii_case(username.as_str());
    if (!own && tx.is_username_taken(&username).await?) || !tx.set_username(id, &username, context.now).await? {
        return Ok(UsernameChangeOutcome::UsernameTaken);
    }
    tx.record(Action::UsernameChanged, &context, AuditTarget::user(id)).await?;
    let user = tx.user(id).await?;
    tx.commit().await?;
    Ok(UsernameChangeOutcome::Changed(user))
}
