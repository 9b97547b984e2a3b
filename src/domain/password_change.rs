//! Another password: by the one before, or by a token from a mail. Either ends every session that there was.

use crate::{
    error::Error,
    store::{Credentials, PasswordChange, PasswordReset, PasswordResetOutcome, SessionOpening},
};

use super::{
    Deadline, MailId, Postern,
    account::{Email, User},
    hasher::Verification,
    mail::MailKind,
    one_time::{OneTimeGrant, Purpose},
    password::{NewPassword, Password},
    role::Caller,
    session::{Client, TokenPair},
};

impl Postern {
    /// Mails a token to reset the password by, if the address is of an enabled account.
    pub async fn request_password_reset(&self, email: Email, client: &Client) -> Result<(), Error> {
        self.request_mail(MailKind::ResetPassword, email, client.ip).await
    }

    /// A token to reset an account's password by, for whoever has the command line to hand on. Whoever made older ones
    /// void by it is told in the audit.
    pub async fn issue_reset_token(&self, email: &Email) -> Result<String, Error> {
        let account = self.store.credentials(email).await?.ok_or(Error::NotFound("user"))?;
        let token = OneTimeGrant {
            id: MailId(self.env.uuid()?),
            purpose: Purpose::ResetPassword,
            user_id: account.user.id,
            email: account.user.email,
        };
        let text = self.one_time.mint(&token);
        if !self.store.issue_token(token, self.occasion(None, None)?).await? {
            return Err(Error::NotFound("enabled user"));
        }
        Ok(text)
    }

    /// Sets a new password by a token that was mailed. It does not log in: who reads a mail need not be who asked.
    pub async fn reset_password(
        &self,
        token: &str,
        new: Password,
        client: &Client,
        deadline: Deadline,
    ) -> Result<(), Error> {
        let token = self.live_token(token, Purpose::ResetPassword).await?;
        // A password that is refused leaves the token as it is.
        let new = self.accept_new(new, &token.user)?;
        let password_hash = self.hasher.hash(new.into_password(), deadline).await?;
        let reset = PasswordReset {
            password_hash,
            attempts: self.guesses.subject(&token.user.email),
            notice: self.mail_to(MailKind::PasswordChanged, token.user.email, Some(token.user.id))?,
            token: token.grant,
            occasion: self.occasion(None, client.ip)?,
        };
        match self.store.reset_password(reset).await? {
            PasswordResetOutcome::Reset => {
                self.spread().await;
                Ok(())
            }
            PasswordResetOutcome::TokenDead => Err(Error::OneTimeTokenInvalid),
        }
    }

    /// Changes the caller's password, and opens the one session that there is then.
    pub async fn change_password(
        &self,
        caller: &Caller,
        current: Password,
        new: Password,
        client: Client,
        deadline: Deadline,
    ) -> Result<TokenPair, Error> {
        let account = self.credentials_of(caller).await?;
        let new = self.accept_new(new, &account.user)?;
        self.prove_password(&account, current, &client, deadline).await?;
        let password_hash = self.hasher.hash(new.into_password(), deadline).await?;
        let (session, refresh) = self.new_session(caller.user_id, account.password_version, client)?;
        let session_id = session.grant.session_id;
        let notice = self.mail_to(MailKind::PasswordChanged, account.user.email, Some(caller.user_id))?;
        match self.store.change_password(PasswordChange { password_hash, session, notice }).await? {
            SessionOpening::Opened(user) => {
                self.spread().await;
                metrics::counter!("postern_sessions_opened_total").increment(1);
                let access = self.tokens.mint_access(&user, session_id, &self.env)?;
                Ok(TokenPair { access, refresh })
            }
            // While the passwords were being hashed it was changed, or the account disabled or deleted.
            SessionOpening::Refused => Err(Error::InvalidCredentials),
        }
    }

    /// The caller's account with its password hash, while the caller's session lives.
    pub(super) async fn credentials_of(&self, caller: &Caller) -> Result<Credentials, Error> {
        self.store.credentials_of_session(caller.session_id, caller.user_id).await?.ok_or(Error::SessionRevoked)
    }

    /// Goes on only with the password of an account that is known already. A wrong one counts as a guess at it.
    pub(super) async fn prove_password(
        &self,
        account: &Credentials,
        password: Password,
        client: &Client,
        deadline: Deadline,
    ) -> Result<(), Error> {
        let user = &account.user;
        let subject = self.reserve_guess(&user.email, client).await?;
        match self.guess(subject, password, Some(account.password_hash.clone()), deadline).await? {
            Verification::Match { rehash: _ } => Ok(self.store.guess_was_right(subject).await?),
            Verification::Mismatch => {
                self.store.login_failed(Some(user.id), self.occasion(Some(user.id), client.ip)?).await?;
                Err(Error::InvalidCredentials)
            }
        }
    }

    fn accept_new(&self, password: Password, user: &User) -> Result<NewPassword, Error> {
        let words = [user.username.as_str(), user.email.as_str()];
        self.accept_password("new_password", password, &words)
            .map_err(|violation| Error::InvalidFields(vec![violation]))
    }
}
