//! The address of an account: verifying it and changing it. A token from a mail is looked up here, for every purpose.
//! That it is used only once is decided in the store's step.

use crate::{
    domain::{
        account::{Email, User},
        env::Deadline,
        ids::MailId,
        mail::{MailKind, NewMail},
        one_time::{PresentedToken, Purpose},
        password::Password,
        ports::{
            EmailChange, EmailChangeRequest, EmailConfirmation, EmailConfirmationOutcome, EmailVerification,
            OneTimeToken,
        },
        role::Person,
        session::Client,
        throttle::AttemptSubject,
    },
    error::{Error, FieldReason},
};

use super::Service;

impl Service {
    /// Marks the address of an account as verified, given the token that was mailed there.
    ///
    /// This proves who owns the address, and not who chose the password. A `caller` with an open session of the account
    /// proves that both are the same person. Without one, all sessions and a pending change of address end.
    pub async fn verify_email(&self, token: &str, caller: Option<&Person>, client: &Client) -> Result<User, Error> {
        let grant = self.verification_token(token).await?.grant;
        let verification = EmailVerification {
            token: grant,
            session: caller.map(|caller| caller.session_id),
            no_password: self.hasher.no_password(),
            context: self.audit_context(None, client.ip)?,
        };
        let Some(user) = self.store.verify_email(verification).await? else {
            // Another call may have used it in the meantime.
            self.verification_token(token).await?;
            return Err(Error::OneTimeTokenInvalid);
        };
        self.sync_revocations().await;
        Ok(user)
    }

    /// A live token that can verify its address. It stays in the database until it expires, and can do nothing more once its
    /// address is verified.
    async fn verification_token(&self, text: &str) -> Result<OneTimeToken, Error> {
        let token = self.live_token(text, Purpose::VerifyEmail).await?;
        let is_spent = token.user.email_verified && token.user.email == token.grant.email;
        if is_spent { Err(Error::OneTimeTokenSpent) } else { Ok(token) }
    }

    /// Mails a new verification token, if an account has the address and has not verified it.
    pub async fn resend_verification_email(&self, email: Email, client: &Client) -> Result<(), Error> {
        self.request_mail(MailKind::VerifyEmail, email, client.ip).await
    }

    /// Mails a token to the new address, and a notice to the current one.
    pub async fn request_email_change(
        &self,
        caller: &Person,
        new_email: Email,
        password: Password,
        client: &Client,
        deadline: Deadline,
    ) -> Result<(), Error> {
        let place = self.admit(client.ip, Some(AttemptSubject::of_user(caller.user_id)), deadline).await?;
        let account = self.credentials_of(caller).await?;
        if account.user.email == new_email {
            return Err(Error::field("new_email", FieldReason::Unchanged, "is already the address of this account"));
        }
        self.mails.limiter.check(client.ip).map_err(|retry_after| Error::Throttled { retry_after })?;
        self.verify_password(&place, &account, password, client, deadline).await?;
        drop(place);
        let with_new_email = |mail: NewMail| NewMail { new_email: Some(new_email.clone()), ..mail };
        let confirmation = self.new_mail(MailKind::ConfirmEmailChange, new_email.clone(), Some(caller.user_id))?;
        let notice = self.new_mail(MailKind::EmailChangeRequested, account.user.email, Some(caller.user_id))?;
        let change = EmailChange {
            user_id: caller.user_id,
            caller: caller.session_id,
            password_version: account.password_version,
            confirmation: with_new_email(confirmation),
            notice: with_new_email(notice),
            owner_notice: self.owner_notice(&new_email)?,
            context: self.audit_context(Some(caller.user_id.into()), client.ip)?,
            limit: self.mails.per_address,
        };
        match self.store.request_email_change(change).await? {
            EmailChangeRequest::Requested => Ok(()),
            EmailChangeRequest::EmailTaken => Err(Error::EmailTaken),
            EmailChangeRequest::OverLimit => Err(Error::Throttled { retry_after: self.mails.per_address.interval }),
            EmailChangeRequest::Refused => Err(self.why_refused(caller).await),
        }
    }

    /// Changes the address of an account to the one that the token was mailed to. Whoever presents the token has read a mail
    /// to that address, so an account that only signed up with it is deleted.
    pub async fn confirm_email_change(&self, token: &str, client: &Client) -> Result<User, Error> {
        let token = self.live_token(token, Purpose::ChangeEmail).await?;
        let context = self.audit_context(None, client.ip)?;
        let confirmation = EmailConfirmation {
            token: token.grant,
            notice: MailId(self.env.uuid()?),
            context,
            eviction: self.audit_context_after(&context)?,
        };
        match self.store.confirm_email_change(confirmation).await? {
            EmailConfirmationOutcome::Changed(user) => {
                self.sync_revocations().await;
                Ok(user)
            }
            EmailConfirmationOutcome::EmailTaken => Err(Error::EmailTaken),
            EmailConfirmationOutcome::TokenDead => Err(Error::OneTimeTokenInvalid),
        }
    }

    /// Looks up a token from a mail, if it is live and has this purpose. Every other token gets the same error.
    pub(super) async fn live_token(&self, text: &str, purpose: Purpose) -> Result<OneTimeToken, Error> {
        let presented = PresentedToken::parse(text).ok_or(Error::OneTimeTokenInvalid)?;
        let token = self.store.one_time_token(presented.id).await?.ok_or(Error::OneTimeTokenInvalid)?;
        // One that would live longer than any was made while a clock was ahead.
        let now = self.env.now();
        let live = self.one_time.matches(&presented, &token.grant)
            && token.grant.purpose == purpose
            && token.expire_time > now
            && token.expire_time <= now + purpose.lifetime();
        if live { Ok(token) } else { Err(Error::OneTimeTokenInvalid) }
    }
}
