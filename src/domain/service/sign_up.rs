//! Accounts: signing up, and looking them up.

use std::time::{Duration, Instant};

use crate::{
    domain::{
        account::{Email, SignUp, User, Username},
        env::Deadline,
        ids::UserId,
        mail::{MailKind, NewMail},
        password::{NewPassword, Password},
        ports::{AccountCreation, NewAccount},
        role::{Person, Role},
        session::Client,
    },
    error::{Error, FieldViolation},
};

use super::{Service, mail::count_withheld};

/// How long the command line waits for a hash.
const COMMAND_PATIENCE: Duration = Duration::from_mins(1);

/// What makes the creation of an account differ from a plain sign-up.
#[derive(Debug, Default)]
struct Registration {
    /// The mail to the owner of a taken address, where the caller must not learn that it is taken.
    owner_notice: Option<NewMail>,
    /// The roles that an operator gives it.
    roles: Option<Vec<Role>>,
    /// Whether an operator vouches for the address.
    email_verified: bool,
}

impl Service {
    /// The username that a caller chooses. `field` names it in the error.
    pub fn chosen_username(&self, field: &'static str, text: &str) -> Result<Username, FieldViolation> {
        let username = Username::parse(text).map_err(|violation| violation.of(field))?;
        self.reserved_usernames.check(field, &username)?;
        Ok(username)
    }

    /// What is wrong with the new password of a request that is refused for another field.
    pub fn check_password_cheaply(&self, field: &'static str, password: &Password) -> Result<(), FieldViolation> {
        self.passwords.check_cheaply(field, password)
    }

    /// Creates an account with the role `user` and mails a verification token to its address. A client that has caused
    /// too many mails gets its account, and the mail when somebody asks for it later.
    ///
    /// The password is hashed even if the address turns out to be taken, so that probing a thousand addresses costs a
    /// thousand hashes. Where the deployment conceals which accounts exist, a taken address gets the answer of a free
    /// one, and its owner gets a mail instead.
    pub async fn sign_up(&self, request: SignUp, client: &Client, deadline: Deadline) -> Result<User, Error> {
        self.store.ensure_reachable()?;
        self.sign_up_limiter.check(client.ip).map_err(|retry_after| Error::Throttled { retry_after })?;
        let owner_notice = self.owner_notice(&request.email)?;
        let registration = Registration { owner_notice, ..Registration::default() };
        self.register(request, registration, Some(client), deadline).await
    }

    /// Creates the account. There is no client on the command line.
    async fn register(
        &self,
        request: SignUp,
        registration: Registration,
        client: Option<&Client>,
        deadline: Deadline,
    ) -> Result<User, Error> {
        let SignUp { username, email, password } = request;
        let Registration { owner_notice, roles, email_verified } = registration;
        let new = NewPassword::new(&self.passwords, "password", password)?;
        let place = self.admit(client.and_then(|client| client.ip), None, deadline).await?;
        let new = new.of_account([username.as_str(), email.as_str()]);
        let password_hash = self.hasher.hash(&place, new, deadline).await?;
        drop(place);
        let id = UserId(self.env.uuid()?);
        let verification = self.new_mail(MailKind::VerifyEmail, email.clone(), Some(id))?;
        let context = self.audit_context(client.map(|_| id.into()), client.and_then(|client| client.ip))?;
        let roles = match roles {
            Some(roles) => Some((roles, self.audit_context_after(&context)?)),
            None => None,
        };
        // The account as it will be if nothing is in the way; also the answer where a taken address is concealed.
        let user = User {
            id,
            username: username.clone(),
            email: email.clone(),
            email_verified: false,
            roles: vec![Role::user()],
            disabled: false,
            create_time: context.now,
            update_time: context.now,
        };
        let account = NewAccount {
            id,
            username,
            email,
            password_hash,
            context,
            roles,
            email_verified,
            owner_notice,
            verification,
            limit: self.mails.per_address,
            withholds_mail: client.is_some_and(|client| self.mails.sign_up_limiter.check(client.ip).is_err()),
        };
        if account.withholds_mail {
            count_withheld("client");
        }
        let conceal = account.owner_notice.is_some();
        match self.store.create_account(account).await? {
            AccountCreation::Created(user) => Ok(user),
            AccountCreation::EmailTaken if conceal => Ok(user),
            AccountCreation::EmailTaken => Err(Error::EmailTaken),
            AccountCreation::UsernameTaken => Err(Error::UsernameTaken),
        }
    }

    /// Creates an account with these roles, for an operator, who may choose a reserved username and vouches for the address
    /// or does not. In the second case its owner gets the same mail as after any sign-up.
    pub async fn create_account(&self, request: SignUp, roles: Vec<Role>, email_verified: bool) -> Result<User, Error> {
        let deadline = Deadline(Instant::now() + COMMAND_PATIENCE);
        let registration = Registration { owner_notice: None, roles: Some(roles), email_verified };
        self.register(request, registration, None, deadline).await
    }

    /// The account with this address.
    pub async fn user_of(&self, email: &Email) -> Result<User, Error> {
        Ok(self.store.credentials(email).await?.ok_or(Error::NotFound("user"))?.user)
    }

    /// The caller's account as it is now. The session is looked up with it, so a session is refused from the moment it
    /// ends.
    pub async fn me(&self, caller: &Person) -> Result<User, Error> {
        self.store.user_of_session(caller.session_id, caller.user_id).await?.ok_or(Error::SessionRevoked)
    }
}
