//! An account's address: proving it, and changing it. What a token from a mail is worth is looked up here, for every
//! purpose; that it is used only once is decided in the store's step.

use crate::{
    error::Error,
    store::{EmailChange, EmailChangeRequest, EmailConfirmation, EmailConfirmationOutcome, OneTimeToken},
};

use super::{
    Deadline, MailId, Postern,
    account::{Email, User},
    mail::{MailKind, NewMail},
    one_time::{PresentedToken, Purpose},
    password::Password,
    role::Caller,
    session::Client,
};

impl Postern {
    /// Marks the address of an account as verified, by the token that was mailed there.
    pub async fn verify_email(&self, token: &str, client: &Client) -> Result<User, Error> {
        let token = self.live_token(token, Purpose::VerifyEmail).await?;
        self.store.verify_email(token.grant, self.occasion(None, client.ip)?).await?.ok_or(Error::OneTimeTokenInvalid)
    }

    /// Mails a new verification token, if the address is of an account that has not verified it.
    pub async fn resend_verification_email(&self, email: Email, client: &Client) -> Result<(), Error> {
        self.request_mail(MailKind::VerifyEmail, email, client.ip).await
    }

    /// Mails a token to the new address, and a notice to the current one.
    pub async fn request_email_change(
        &self,
        caller: &Caller,
        new_email: Email,
        password: Password,
        client: &Client,
        deadline: Deadline,
    ) -> Result<(), Error> {
        let account = self.credentials_of(caller).await?;
        if account.user.email == new_email {
            return Err(Error::field("new_email", "is the address of this account already"));
        }
        self.mails.per_client.take(client.ip).map_err(|retry_after| Error::Throttled { retry_after })?;
        self.prove_password(&account, password, client, deadline).await?;
        let about = |mail: NewMail| NewMail { new_email: Some(new_email.clone()), ..mail };
        let confirmation = self.mail_to(MailKind::ConfirmEmailChange, new_email.clone(), Some(caller.user_id))?;
        let notice = self.mail_to(MailKind::EmailChangeRequested, account.user.email, Some(caller.user_id))?;
        let change = EmailChange {
            user_id: caller.user_id,
            password_version: account.password_version,
            confirmation: about(confirmation),
            notice: about(notice),
            concealed: self.concealed(&new_email)?,
            occasion: self.occasion(Some(caller.user_id), client.ip)?,
            limit: self.mails.per_address,
        };
        match self.store.request_email_change(change).await? {
            EmailChangeRequest::Requested => Ok(()),
            EmailChangeRequest::EmailTaken => Err(Error::EmailTaken),
            EmailChangeRequest::OverLimit => Err(Error::Throttled { retry_after: self.mails.per_address.interval }),
            EmailChangeRequest::Refused => Err(Error::InvalidCredentials),
        }
    }

    /// Changes an account's address to the one that the token was mailed to.
    pub async fn confirm_email_change(&self, token: &str, client: &Client) -> Result<User, Error> {
        let token = self.live_token(token, Purpose::ChangeEmail).await?;
        let confirmation = EmailConfirmation {
            token: token.grant,
            notice: MailId(self.env.uuid()?),
            occasion: self.occasion(None, client.ip)?,
        };
        match self.store.confirm_email_change(confirmation).await? {
            EmailConfirmationOutcome::Changed(user) => Ok(user),
            EmailConfirmationOutcome::EmailTaken => Err(Error::EmailTaken),
            EmailConfirmationOutcome::TokenDead => Err(Error::OneTimeTokenInvalid),
        }
    }

    /// What a token from a mail stands for, if it is a live one for that purpose. One answer for all that are not.
    pub(super) async fn live_token(&self, text: &str, purpose: Purpose) -> Result<OneTimeToken, Error> {
        let presented = PresentedToken::parse(text).ok_or(Error::OneTimeTokenInvalid)?;
        let token = self.store.one_time_token(presented.id).await?.ok_or(Error::OneTimeTokenInvalid)?;
        let live = self.one_time.is_of(&presented, &token.grant)
            && token.grant.purpose == purpose
            && token.expire_time > self.env.now();
        if live { Ok(token) } else { Err(Error::OneTimeTokenInvalid) }
    }
}
