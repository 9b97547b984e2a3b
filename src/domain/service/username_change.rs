//! Changing the username of an account.

use crate::{
    domain::{
        account::{User, Username},
        env::Deadline,
        password::Password,
        ports::{UsernameChange, UsernameChangeOutcome},
        role::Person,
        session::Client,
        throttle::AttemptSubject,
    },
    error::{Error, FieldReason},
};

use super::Service;

impl Service {
    /// Changes the username of the caller, who proves to know the password. Access tokens keep the old name until they
    /// expire. `username` is from [`Service::chosen_username`].
    pub async fn change_username(
        &self,
        caller: &Person,
        username: Username,
        password: Password,
        client: &Client,
        deadline: Deadline,
    ) -> Result<User, Error> {
        let place = self.admit(client.ip, Some(AttemptSubject::of_user(caller.user_id)), deadline).await?;
        let account = self.credentials_of(caller).await?;
        if account.user.username == username {
            return Err(Error::field(
                "new_username",
                FieldReason::Unchanged,
                "is already the username of this account",
            ));
        }
        self.verify_password(&place, &account, password, client, deadline).await?;
        drop(place);
        let change = UsernameChange {
            user_id: caller.user_id,
            caller: caller.session_id,
            password_version: account.password_version,
            username,
            context: self.audit_context(Some(caller.user_id.into()), client.ip)?,
        };
        match self.store.change_username(change).await? {
            UsernameChangeOutcome::Changed(user) => Ok(user),
            UsernameChangeOutcome::UsernameTaken => Err(Error::UsernameTaken),
            UsernameChangeOutcome::Refused => Err(self.why_refused(caller).await),
        }
    }
}
