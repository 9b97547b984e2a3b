//! The steps of mail and one-time tokens that are the same on every backend, and what other steps do with both.

use time::OffsetDateTime;

use crate::{
    domain::{
        account::Email,
        audit::{Action, AuditContext, AuditTarget},
        ids::UserId,
        mail::{MailKind, NewMail},
        one_time::{OneTimeGrant, Purpose},
        ports::{Enqueued, MailClaim},
        throttle::AddressLimit,
    },
    error::StoreError,
    store::rows::LeasedMail,
};

use super::transaction::{Budget, WriteTransaction};

pub(in crate::store) async fn request_mail(
    mut tx: impl WriteTransaction,
    mail: NewMail,
    limit: AddressLimit,
) -> Result<Enqueued, StoreError> {
    let enqueued = queue_within(&mut tx, &mail, limit).await?;
    tx.commit().await?;
    Ok(enqueued)
}

pub(in crate::store) async fn issue_token(
    mut tx: impl WriteTransaction,
    token: OneTimeGrant,
    context: AuditContext,
) -> Result<bool, StoreError> {
    let user = tx.lock_user(token.user_id).await?;
    if !user.is_some_and(|user| !user.disabled && user.email == token.email) {
        return Ok(false);
    }
    put_token(&mut tx, &token, context.now, context.now).await?;
    tx.record(Action::ResetLinkIssued, &context, AuditTarget::user(token.user_id)).await?;
    tx.commit().await?;
    Ok(true)
}

/// Decides whose a leased mail is and whether it is still wanted, and makes its token the live one. The transaction is
/// still to be committed, also if this fails.
pub(in crate::store) async fn prepare<T: WriteTransaction>(
    tx: &mut T,
    leased: LeasedMail,
    now: OffsetDateTime,
) -> Result<MailClaim, StoreError> {
    let dropped = MailClaim::Dropped(leased.mail.kind);
    // A step that ends this user's tokens waits for this row; or this one waits for it, and finds the mail gone.
    let user = match leased.mail.user_id {
        Some(id) => tx.lock_user(id).await?,
        None => tx.lock_user_by_email(&leased.mail.recipient).await?,
    };
    if !tx.lock_mail(leased.mail.id, leased.attempt).await? {
        return Ok(dropped);
    }
    if let Some(user) = user.filter(|user| leased.mail.kind.is_wanted(&leased.mail.recipient, user)) {
        let grant = leased.grant(&user);
        let is_live = match &grant {
            Some(grant) => put_token(tx, grant, leased.mail.create_time, now).await?,
            None => true,
        };
        if is_live {
            return Ok(MailClaim::Claimed(leased.claimed(grant)));
        }
    }
    tx.delete_mail(leased.mail.id).await?;
    Ok(dropped)
}

/// Makes a token its account's one live token for its purpose. `false` if a newer one exists, or if the token would be
/// expired already.
async fn put_token<T: WriteTransaction>(
    tx: &mut T,
    token: &OneTimeGrant,
    create_time: OffsetDateTime,
    now: OffsetDateTime,
) -> Result<bool, StoreError> {
    // A mail from after now was asked for while a clock was ahead.
    let create_time = create_time.min(now);
    let expire_time = create_time + token.purpose.lifetime();
    Ok(expire_time > now && tx.put_token(token, create_time, expire_time, now).await?)
}

/// Queues a mail, if its address is within its limit.
pub(super) async fn queue_within<T: WriteTransaction>(
    tx: &mut T,
    mail: &NewMail,
    limit: AddressLimit,
) -> Result<Enqueued, StoreError> {
    let furthest = limit.furthest();
    let mut has_room = tx.count_mail(Budget::All, mail, limit, furthest).await?;
    if mail.kind == MailKind::ResetPassword {
        // Other mails cannot spend the last way in of the owner: a few resets are sent beyond the common budget, unless
        // there were many resets lately.
        let own = if has_room { limit.unlimited() } else { limit.kept_for_resets() };
        has_room = tx.count_mail(Budget::Resets, mail, own, furthest).await?;
    }
    if !has_room {
        return Ok(Enqueued::OverLimit);
    }
    tx.queue(mail).await?;
    Ok(Enqueued::Queued)
}

/// Consumes a live token, if it has this purpose.
pub(super) async fn consume_token<T: WriteTransaction>(
    tx: &mut T,
    purpose: Purpose,
    token: &OneTimeGrant,
    now: OffsetDateTime,
) -> Result<bool, StoreError> {
    Ok(token.purpose == purpose && tx.delete_token(token, now).await?)
}

/// Ends an account's tokens for these purposes, and the mails that would bring new ones. The caller holds the lock on
/// the user. `email` is the address that mails were requested for.
pub(super) async fn void_tokens<T: WriteTransaction>(
    tx: &mut T,
    user: UserId,
    email: &Email,
    purposes: &[Purpose],
) -> Result<(), StoreError> {
    for purpose in purposes {
        tx.delete_tokens(user, *purpose).await?;
        void_mails(tx, user, email, *purpose).await?;
    }
    Ok(())
}

/// Deletes the mails that would bring an account a new token for this purpose.
pub(super) async fn void_mails<T: WriteTransaction>(
    tx: &mut T,
    user: UserId,
    email: &Email,
    purpose: Purpose,
) -> Result<(), StoreError> {
    let kind = MailKind::carrying(purpose);
    tx.delete_mails_of(user, kind).await?;
    tx.delete_mails_to(email, kind).await
}
