//! Administration of accounts, the caller's own sessions, and the audit log. Whether the caller may is decided before,
//! by the contract. That the last admin stays is decided in the store's step.

use std::str::FromStr;

use crate::{
    domain::{
        account::User,
        admin::{Administrator, Page},
        audit::{Action, AuditContext, AuditEvent},
        env::Deadline,
        ids::{AuditEventId, SessionId, UserId},
        password::Password,
        ports::{AuditPage, SessionPage, UserChange, UserDeletion, UserDeletionOutcome, UserOrder, UserPage},
        role::{Person, Role},
        session::{Client, SessionSummary},
        throttle::AttemptSubject,
    },
    error::{Error, FieldReason},
};

use super::Service;

impl Service {
    /// A page of all accounts, oldest first. With a query: of the accounts whose address starts with it, followed by
    /// those whose username does.
    pub async fn list_users(&self, size: u32, page_token: &str, query: &str) -> Result<Page<User>, Error> {
        let list = format!("users:{query}");
        let mut order = match self.cursor(&list, page_token)? {
            None => UserOrder::of_query(query),
            Some(cursor) => {
                user_order(query, &cursor).ok_or_else(|| Error::internal("a page token of another release"))?
            }
        };
        let mut entries = Vec::new();
        let mut last_of_page = None;
        loop {
            let missing = size + 1 - u32::try_from(entries.len()).unwrap_or(u32::MAX);
            let found = self.store.list_users(UserPage { order: order.clone(), limit: missing }).await?;
            for user in found {
                // One more entry than fits shows that there is a next page.
                if entries.len() == usize::try_from(size).unwrap_or(usize::MAX) {
                    let next =
                        last_of_page.map(|cursor: String| self.pages.seal(&list, &cursor, &self.env)).transpose()?;
                    return Ok(Page { entries, next });
                }
                last_of_page = Some(cursor_of(&order, &user));
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

    /// Replaces the roles of an account.
    pub async fn set_roles(&self, id: UserId, roles: Vec<Role>, by: Administrator) -> Result<User, Error> {
        let change = self.store.set_roles(id, roles, self.administrative(by)?).await?;
        self.changed(change).await
    }

    /// Disables an account and ends its sessions.
    pub async fn disable_user(&self, id: UserId, reason: Option<String>, by: Administrator) -> Result<User, Error> {
        let change = self.store.disable_user(id, reason, self.administrative(by)?).await?;
        self.changed(change).await
    }

    /// Enables an account again.
    pub async fn enable_user(&self, id: UserId, by: Administrator) -> Result<User, Error> {
        let change = self.store.enable_user(id, self.administrative(by)?).await?;
        self.changed(change).await
    }

    /// Ends every session of an account and returns how many were open.
    pub async fn revoke_user_sessions(&self, id: UserId, by: Administrator) -> Result<u64, Error> {
        let context = self.administrative(by)?;
        let count = self.store.revoke_user_sessions(id, context).await?.ok_or(Error::NotFound("user"))?;
        self.sync_revocations().await;
        Ok(count)
    }

    /// Deletes an account and everything that belongs to it.
    pub async fn delete_user(&self, id: UserId, by: Administrator) -> Result<(), Error> {
        let deletion = UserDeletion { user: id, password_version: None, context: self.administrative(by)? };
        self.delete(deletion).await
    }

    /// Deletes the caller's own account.
    pub async fn delete_account(
        &self,
        caller: &Person,
        password: Password,
        client: &Client,
        deadline: Deadline,
    ) -> Result<(), Error> {
        let place = self.admit(client.ip, Some(AttemptSubject::of_user(caller.user_id)), deadline).await?;
        let account = self.credentials_of(caller).await?;
        self.verify_password(&place, &account, password, client, deadline).await?;
        drop(place);
        let deletion = UserDeletion {
            user: caller.user_id,
            password_version: Some(account.password_version),
            context: self.audit_context(Some(caller.user_id.into()), client.ip)?,
        };
        self.delete(deletion).await
    }

    /// A page of the caller's open sessions, newest first.
    pub async fn list_sessions(
        &self,
        caller: &Person,
        size: u32,
        page_token: &str,
    ) -> Result<Page<SessionSummary>, Error> {
        let list = format!("sessions:{}", caller.user_id);
        let before = self.id_cursor(&list, page_token)?;
        let page = SessionPage { user: caller.user_id, now: self.env.now(), before, limit: size + 1 };
        self.page(&list, size, self.store.list_sessions(page).await?, |session| session.id.to_string())
    }

    /// Ends one of the caller's sessions.
    pub async fn revoke_session(&self, caller: &Person, id: SessionId, client: &Client) -> Result<(), Error> {
        let context = self.audit_context(Some(caller.user_id.into()), client.ip)?;
        if !self.store.revoke_session(id, caller.user_id, context).await? {
            return Err(Error::NotFound("session"));
        }
        self.sync_revocations().await;
        Ok(())
    }

    /// A page of the audit log, newest first.
    pub async fn list_audit_events(
        &self,
        size: u32,
        page_token: &str,
        user: Option<UserId>,
        action: Option<Action>,
    ) -> Result<Page<AuditEvent>, Error> {
        let name = action.map_or("", Action::as_str);
        let list = format!("audit:{}:{name}", user.map(|id| id.to_string()).unwrap_or_default());
        let before: Option<AuditEventId> = self.id_cursor(&list, page_token)?;
        let entries = self.store.list_audit_events(AuditPage { user, action, before, limit: size + 1 }).await?;
        self.page(&list, size, entries, |event| event.id.to_string())
    }

    /// A page of `size` entries at most. One more entry shows that there is a next page.
    pub(super) fn page<T>(
        &self,
        list: &str,
        size: u32,
        mut entries: Vec<T>,
        cursor_of: impl Fn(&T) -> String,
    ) -> Result<Page<T>, Error> {
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        let more = entries.len() > size;
        entries.truncate(size);
        let end_of_page = entries.last().filter(|_| more).map(cursor_of);
        let next = end_of_page.map(|cursor| self.pages.seal(list, &cursor, &self.env)).transpose()?;
        Ok(Page { entries, next })
    }

    /// The id in a page token; `None` for the first page.
    pub(super) fn id_cursor<T: FromStr>(&self, list: &str, page_token: &str) -> Result<Option<T>, Error> {
        let id = |cursor: String| cursor.parse().map_err(|_| Error::internal("a page token of another release"));
        self.cursor(list, page_token)?.map(id).transpose()
    }

    /// The position in a page token; `None` for the first page.
    fn cursor(&self, list: &str, page_token: &str) -> Result<Option<String>, Error> {
        if page_token.is_empty() {
            return Ok(None);
        }
        let cursor = self.pages.open(list, page_token);
        cursor
            .map(Some)
            .ok_or_else(|| Error::field("page_token", FieldReason::Malformed, "was not issued for this query"))
    }

    pub(super) fn administrative(&self, by: Administrator) -> Result<AuditContext, Error> {
        self.audit_context(by.id, by.ip)
    }

    async fn changed(&self, change: UserChange) -> Result<User, Error> {
        match change {
            UserChange::Changed(user) => {
                self.sync_revocations().await;
                Ok(user)
            }
            UserChange::NoSuchUser => Err(Error::NotFound("user")),
            UserChange::LastAdmin => Err(Error::LastAdmin),
        }
    }

    async fn delete(&self, deletion: UserDeletion) -> Result<(), Error> {
        match self.store.delete_user(deletion).await? {
            UserDeletionOutcome::Deleted => {
                self.sync_revocations().await;
                Ok(())
            }
            UserDeletionOutcome::NoSuchUser => Err(Error::NotFound("user")),
            UserDeletionOutcome::LastAdmin => Err(Error::LastAdmin),
            UserDeletionOutcome::Refused => Err(Error::InvalidCredentials),
        }
    }
}

/// The position of an account in its list, as a page token holds it.
fn cursor_of(order: &UserOrder, user: &User) -> String {
    match order {
        UserOrder::ById { .. } => user.id.to_string(),
        UserOrder::ByEmail { .. } => format!("e{}", user.email.as_str()),
        UserOrder::ByUsername { .. } => format!("u{}", user.username.as_str().to_ascii_lowercase()),
    }
}

/// The list that continues after a position.
fn user_order(query: &str, cursor: &str) -> Option<UserOrder> {
    if query.is_empty() {
        return Some(UserOrder::ById { after: Some(cursor.parse().ok()?) });
    }
    let prefix = query.to_owned();
    if let Some(email) = cursor.strip_prefix('e') {
        return Some(UserOrder::ByEmail { prefix, after: Some(email.to_owned()) });
    }
    let name = cursor.strip_prefix('u')?;
    Some(UserOrder::ByUsername { prefix, after: Some(name.to_owned()) })
}
