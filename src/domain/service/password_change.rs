//! Changing a password: with the current one, or with a token from a mail. Both end every session that was open.

use crate::{
    domain::{
        account::Email,
        env::Deadline,
        ids::MailId,
        mail::MailKind,
        one_time::{OneTimeGrant, Purpose},
        password::{NewPassword, Password},
        ports::{Credentials, PasswordChange, PasswordReset, PasswordResetOutcome, SessionOpening},
        role::Person,
        session::Client,
        throttle::AttemptSubject,
        token::TokenPair,
    },
    error::Error,
};

use super::Service;

impl Service {
    /// Mails a token that resets the password, if an enabled account has the address.
    pub async fn request_password_reset(&self, email: Email, client: &Client) -> Result<(), Error> {
        self.request_mail(MailKind::ResetPassword, email, client.ip).await
    }

    /// Issues a token that resets an account's password, for an operator to pass on. It invalidates earlier reset
    /// tokens and is recorded in the audit log.
    pub async fn issue_reset_token(&self, email: &Email) -> Result<String, Error> {
        let account = self.store.credentials(email).await?.ok_or(Error::NotFound("user"))?;
        let token = OneTimeGrant {
            id: MailId(self.env.uuid()?),
            purpose: Purpose::ResetPassword,
            user_id: account.user.id,
            email: account.user.email,
        };
        let text = self.one_time.mint(&token);
        if !self.store.issue_token(token, self.audit_context(None, None)?).await? {
            return Err(Error::NotFound("enabled user"));
        }
        Ok(text)
    }

    /// Sets a new password with a token that was mailed. It does not log in: the reader of a mail need not be the
    /// person who asked for it.
    pub async fn reset_password(
        &self,
        token: &str,
        new: Password,
        client: &Client,
        deadline: Deadline,
    ) -> Result<(), Error> {
        let new = NewPassword::new(&self.passwords, "new_password", new)?;
        let place = self.admit(client.ip, None, deadline).await?;
        let token = self.live_token(token, Purpose::ResetPassword).await?;
        // A refused password leaves the token unused.
        let new = new.of_account([token.user.username.as_str(), token.user.email.as_str()]);
        let password_hash = self.hasher.hash(&place, new, deadline).await?;
        drop(place);
        let reset = PasswordReset {
            password_hash,
            attempts: self.login_attempts.subject(&token.user.email),
            notice: self.new_mail(MailKind::PasswordChanged, token.user.email, Some(token.user.id))?,
            token: token.grant,
            context: self.audit_context(None, client.ip)?,
        };
        match self.store.reset_password(reset).await? {
            PasswordResetOutcome::Reset => {
                self.sync_revocations().await;
                Ok(())
            }
            PasswordResetOutcome::TokenDead => Err(Error::OneTimeTokenInvalid),
        }
    }

    /// Changes the caller's password and opens a new session, the only one that is open afterwards.
    pub async fn change_password(
        &self,
        caller: &Person,
        current: Password,
        new: Password,
        client: Client,
        deadline: Deadline,
    ) -> Result<TokenPair, Error> {
        let new = NewPassword::new(&self.passwords, "new_password", new)?;
        let place = self.admit(client.ip, Some(AttemptSubject::of_user(caller.user_id)), deadline).await?;
        let account = self.credentials_of(caller).await?;
        self.verify_password(&place, &account, current, &client, deadline).await?;
        let new = new.of_account([account.user.username.as_str(), account.user.email.as_str()]);
        let password_hash = self.hasher.hash(&place, new, deadline).await?;
        drop(place);
        let (session, refresh) = self.new_session(caller.user_id, account.password_version, client)?;
        let session_id = session.grant.session_id;
        let notice = self.new_mail(MailKind::PasswordChanged, account.user.email, Some(caller.user_id))?;
        let limit = self.mails.per_address;
        let change = PasswordChange { password_hash, caller: caller.session_id, session, notice, limit };
        match self.store.change_password(change).await? {
            SessionOpening::Opened(user) | SessionOpening::OpenedTooMany(user) => {
                self.sync_revocations().await;
                metrics::counter!("postern_sessions_opened_total").increment(1);
                let access = self.tokens.mint_access(&user, session_id, 0, &self.env)?;
                Ok(TokenPair { access, refresh })
            }
            // While the hashes were computed, the caller's session ended, the password was changed, or the account was
            // disabled or deleted.
            SessionOpening::Refused => Err(self.why_refused(caller).await),
        }
    }

    /// Why a step of a caller whose password was right was refused: its session has ended, or the password has changed.
    pub(super) async fn why_refused(&self, caller: &Person) -> Error {
        self.credentials_of(caller).await.err().unwrap_or(Error::InvalidCredentials)
    }

    /// The caller's account with its password hash, while the caller's session is open.
    pub(super) async fn credentials_of(&self, caller: &Person) -> Result<Credentials, Error> {
        self.store.credentials_of_session(caller.session_id, caller.user_id).await?.ok_or(Error::SessionRevoked)
    }
}
