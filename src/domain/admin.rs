//! What admins do with the accounts of others, and people with their own sessions. That the caller may is decided before,
//! by the contract; nobody takes the last admin away, which is decided in the store's step.

use std::net::IpAddr;

use crate::{
    error::{Error, FieldViolation},
    store::{AuditPage, UserChange, UserDeletion, UserDeletionOutcome, UserOrder, UserPage},
};

use super::{
    AuditEventId, Deadline, Postern, SessionId, UserId,
    account::User,
    audit::{Action, AuditEvent, Occasion},
    password::Password,
    role::{Caller, Role},
    session::{Client, SessionSummary},
};

/// How many entries a page has where nothing is asked for, and at most.
const USUAL_PAGE: u32 = 50;
const LARGEST_PAGE: u32 = 200;
/// The longest text to search for, in bytes: no address is longer.
const LONGEST_QUERY: usize = 254;
/// The most roles of one account.
const MOST_ROLES: usize = 32;
/// The longest reason for the audit, in characters.
const LONGEST_REASON: usize = 500;

/// A page, and where the next one begins.
#[derive(Debug)]
pub struct Page<T> {
    pub entries: Vec<T>,
    /// `None` on the last page.
    pub next: Option<String>,
}

/// Who asks for an administrative step: an admin over the network, or whoever has the command line.
#[derive(Debug, Clone, Copy)]
pub struct Administrator {
    pub id: Option<UserId>,
    pub ip: Option<IpAddr>,
}

impl Administrator {
    pub fn new(caller: &Caller, client: &Client) -> Self {
        Self { id: Some(caller.user_id), ip: client.ip }
    }

    /// Who works on the store itself.
    pub const COMMAND_LINE: Self = Self { id: None, ip: None };
}

/// How many entries are asked for.
pub fn page_size(asked: i32) -> Result<u32, FieldViolation> {
    match u32::try_from(asked) {
        Ok(0) => Ok(USUAL_PAGE),
        Ok(size) => Ok(size.min(LARGEST_PAGE)),
        Err(_) => Err(FieldViolation::new("page_size", "must not be negative")),
    }
}

/// The roles that an account is to have: those, and `user`; sorted.
pub fn role_set(names: &[String]) -> Result<Vec<Role>, FieldViolation> {
    let violation = |description| Err(FieldViolation::new("roles", description));
    if names.len() > MOST_ROLES {
        return violation("must be at most 32");
    }
    let mut roles = vec![Role::user()];
    for name in names {
        let Some(role) = Role::parse(name) else {
            return violation("must each be a name such as billing-read: a-z, then a-z, 0-9, _ or -, at most 64");
        };
        roles.push(role);
    }
    roles.sort();
    roles.dedup();
    Ok(roles)
}

/// What accounts are searched by.
pub fn search_text(text: &str) -> Result<String, FieldViolation> {
    if text.len() > LONGEST_QUERY || text.contains(char::is_control) {
        return Err(FieldViolation::new("query", "must be at most 254 bytes, without control characters"));
    }
    Ok(text.trim().to_lowercase())
}

/// Why an account is disabled.
pub fn reason(text: String) -> Result<Option<String>, FieldViolation> {
    if text.chars().count() > LONGEST_REASON || text.contains(char::is_control) {
        return Err(FieldViolation::new("reason", "must be at most 500 characters, in one line"));
    }
    Ok(Some(text).filter(|text| !text.is_empty()))
}

impl Postern {
    /// A page of all accounts, oldest first; with a query, of those whose address begins with it, then of those whose
    /// username does.
    pub async fn list_users(&self, size: u32, page_token: &str, query: &str) -> Result<Page<User>, Error> {
        let list = format!("users:{query}");
        let mut order = match self.place(&list, page_token)? {
            None if query.is_empty() => UserOrder::ById { after: None },
            None => UserOrder::ByEmail { prefix: query.to_owned(), after: None },
            Some(place) => {
                user_order(query, &place).ok_or_else(|| Error::internal("a page token of another release"))?
            }
        };
        let mut entries = Vec::new();
        let mut last_of_page = None;
        loop {
            let missing = size + 1 - u32::try_from(entries.len()).unwrap_or(u32::MAX);
            let found = self.store.list_users(UserPage { order: order.clone(), limit: missing }).await?;
            for user in found {
                // One more than is shown tells that there is a next page.
                if entries.len() == usize::try_from(size).unwrap_or(usize::MAX) {
                    let next =
                        last_of_page.map(|place: String| self.pages.seal(&list, &place, &self.env)).transpose()?;
                    return Ok(Page { entries, next });
                }
                last_of_page = Some(place_of(&order, &user));
                entries.push(user);
            }
            order = match order {
                UserOrder::ByEmail { prefix, after: _ } => UserOrder::ByUsername { prefix, after: None },
                UserOrder::ById { .. } | UserOrder::ByUsername { .. } => return Ok(Page { entries, next: None }),
            };
        }
    }

    /// One account.
    pub async fn user(&self, id: UserId) -> Result<User, Error> {
        self.store.user(id).await?.ok_or(Error::NotFound("user"))
    }

    /// Gives an account these roles in the place of those that it has.
    pub async fn set_roles(&self, id: UserId, roles: Vec<Role>, by: Administrator) -> Result<User, Error> {
        let change = self.store.set_roles(id, roles, self.administrative(by)?).await?;
        self.changed(change).await
    }

    pub async fn disable_user(&self, id: UserId, reason: Option<String>, by: Administrator) -> Result<User, Error> {
        let change = self.store.disable_user(id, reason, self.administrative(by)?).await?;
        self.changed(change).await
    }

    pub async fn enable_user(&self, id: UserId, by: Administrator) -> Result<User, Error> {
        let change = self.store.enable_user(id, self.administrative(by)?).await?;
        self.changed(change).await
    }

    /// Ends every session of an account; returns how many there were.
    pub async fn revoke_user_sessions(&self, id: UserId, by: Administrator) -> Result<u64, Error> {
        let occasion = self.administrative(by)?;
        let count = self.store.revoke_user_sessions(id, occasion).await?.ok_or(Error::NotFound("user"))?;
        self.spread().await;
        Ok(count)
    }

    pub async fn delete_user(&self, id: UserId, by: Administrator) -> Result<(), Error> {
        let deletion =
            UserDeletion { user: id, password_version: None, occasion: self.administrative(by)?, notice: None };
        self.delete(deletion).await
    }

    /// Deletes the caller's own account.
    pub async fn delete_account(
        &self,
        caller: &Caller,
        password: Password,
        client: &Client,
        deadline: Deadline,
    ) -> Result<(), Error> {
        let account = self.credentials_of(caller).await?;
        self.prove_password(&account, password, client, deadline).await?;
        let deletion = UserDeletion {
            user: caller.user_id,
            password_version: Some(account.password_version),
            occasion: self.occasion(Some(caller.user_id), client.ip)?,
            notice: None,
        };
        self.delete(deletion).await
    }

    /// The caller's open sessions, newest first.
    pub async fn list_sessions(&self, caller: &Caller) -> Result<Vec<SessionSummary>, Error> {
        Ok(self.store.list_sessions(caller.user_id, self.env.now()).await?)
    }

    /// Ends one of the caller's sessions.
    pub async fn revoke_session(&self, caller: &Caller, id: SessionId, client: &Client) -> Result<(), Error> {
        let occasion = self.occasion(Some(caller.user_id), client.ip)?;
        if !self.store.revoke_session(id, caller.user_id, occasion).await? {
            return Err(Error::NotFound("session"));
        }
        self.spread().await;
        Ok(())
    }

    /// A page of the audit, newest first.
    pub async fn list_audit_events(
        &self,
        size: u32,
        page_token: &str,
        user: Option<UserId>,
        action: Option<Action>,
    ) -> Result<Page<AuditEvent>, Error> {
        let name = action.map_or("", Action::as_str);
        let list = format!("audit:{}:{name}", user.map(|id| id.to_string()).unwrap_or_default());
        let before = match self.place(&list, page_token)? {
            None => None,
            Some(place) => {
                let id: AuditEventId = place.parse().map_err(|_| Error::internal("a page token of another release"))?;
                Some(id)
            }
        };
        let mut entries = self.store.list_audit_events(AuditPage { user, action, before, limit: size + 1 }).await?;
        let more = entries.len() > usize::try_from(size).unwrap_or(usize::MAX);
        entries.truncate(usize::try_from(size).unwrap_or(usize::MAX));
        let end_of_page = entries.last().filter(|_| more).map(|event| event.id.to_string());
        let next = end_of_page.map(|place| self.pages.seal(&list, &place, &self.env)).transpose()?;
        Ok(Page { entries, next })
    }

    fn place(&self, list: &str, page_token: &str) -> Result<Option<String>, Error> {
        if page_token.is_empty() {
            return Ok(None);
        }
        let place = self.pages.open(list, page_token);
        place.map(Some).ok_or_else(|| Error::field("page_token", "was not given out for this query"))
    }

    fn administrative(&self, by: Administrator) -> Result<Occasion, Error> {
        self.occasion(by.id, by.ip)
    }

    async fn changed(&self, change: UserChange) -> Result<User, Error> {
        match change {
            UserChange::Changed(user) => {
                self.spread().await;
                Ok(user)
            }
            UserChange::NoSuchUser => Err(Error::NotFound("user")),
            UserChange::LastAdmin => Err(Error::LastAdmin),
        }
    }

    async fn delete(&self, deletion: UserDeletion) -> Result<(), Error> {
        match self.store.delete_user(deletion).await? {
            UserDeletionOutcome::Deleted => {
                self.spread().await;
                Ok(())
            }
            UserDeletionOutcome::NoSuchUser => Err(Error::NotFound("user")),
            UserDeletionOutcome::LastAdmin => Err(Error::LastAdmin),
            UserDeletionOutcome::Refused => Err(Error::InvalidCredentials),
        }
    }
}

/// Where an entry stands in its list, as a page token has it.
fn place_of(order: &UserOrder, user: &User) -> String {
    match order {
        UserOrder::ById { .. } => user.id.to_string(),
        UserOrder::ByEmail { .. } => format!("e{}", user.email.as_str()),
        UserOrder::ByUsername { .. } => format!("u{}", user.username.as_str().to_ascii_lowercase()),
    }
}

/// The list from a place on.
fn user_order(query: &str, place: &str) -> Option<UserOrder> {
    if query.is_empty() {
        return Some(UserOrder::ById { after: Some(place.parse().ok()?) });
    }
    let prefix = query.to_owned();
    if let Some(email) = place.strip_prefix('e') {
        return Some(UserOrder::ByEmail { prefix, after: Some(email.to_owned()) });
    }
    let name = place.strip_prefix('u')?;
    Some(UserOrder::ByUsername { prefix, after: Some(name.to_owned()) })
}
