//! `AdminService`: each RPC parses its request, calls the domain once, and converts the result to a reply.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use crate::{
    domain::{
        admin::{Administrator, page_size, reason, role_set, roles, search_text},
        audit::{Action, AuditEvent},
        ids::{ServiceAccountId, UserId},
        service::Service,
        service_account::{ServiceAccount, ServiceKey, ServiceName, description},
    },
    error::{Error, FieldReason, FieldViolation},
    proto::{self, admin_service_server::AdminService},
};

use super::request::{Violations, caller, client, id, moment, single_field, timestamp};

/// The RPCs of `AdminService`.
#[derive(Debug, Clone)]
pub struct AdminRpcs {
    service: Arc<Service>,
}

impl AdminRpcs {
    pub fn new(service: Arc<Service>) -> Self {
        Self { service }
    }
}

#[tonic::async_trait]
impl AdminService for AdminRpcs {
    async fn list_users(
        &self,
        request: Request<proto::ListUsersRequest>,
    ) -> Result<Response<proto::ListUsersResponse>, Status> {
        let proto::ListUsersRequest { page_size: size, page_token, query } = request.into_inner();
        let mut violations = Violations::default();
        let size = violations.collect(page_size(size));
        let query = violations.collect(search_text(&query));
        let (Some(size), Some(query)) = (size, query) else {
            return Err(violations.into_status());
        };
        let page = self.service.list_users(size, &page_token, &query).await?;
        Ok(Response::new(proto::ListUsersResponse {
            users: page.entries.into_iter().map(Into::into).collect(),
            next_page_token: page.next.unwrap_or_default(),
        }))
    }

    async fn get_user(
        &self,
        request: Request<proto::GetUserRequest>,
    ) -> Result<Response<proto::GetUserResponse>, Status> {
        let user_id = single_field(id("user_id", &request.into_inner().user_id))?;
        let user = self.service.user(user_id).await?;
        Ok(Response::new(proto::GetUserResponse { user: Some(user.into()) }))
    }

    async fn set_user_roles(
        &self,
        request: Request<proto::SetUserRolesRequest>,
    ) -> Result<Response<proto::SetUserRolesResponse>, Status> {
        let by = administrator(&request)?;
        let proto::SetUserRolesRequest { user_id, roles } = request.into_inner();
        let mut violations = Violations::default();
        let user_id = violations.collect(id("user_id", &user_id));
        let roles = violations.collect(role_set(&roles));
        let (Some(user_id), Some(roles)) = (user_id, roles) else {
            return Err(violations.into_status());
        };
        let user = self.service.set_roles(user_id, roles, by).await?;
        Ok(Response::new(proto::SetUserRolesResponse { user: Some(user.into()) }))
    }

    async fn disable_user(
        &self,
        request: Request<proto::DisableUserRequest>,
    ) -> Result<Response<proto::DisableUserResponse>, Status> {
        let by = administrator(&request)?;
        let proto::DisableUserRequest { user_id, reason: text } = request.into_inner();
        let mut violations = Violations::default();
        let user_id = violations.collect(id("user_id", &user_id));
        let reason = violations.collect(reason(text));
        let (Some(user_id), Some(reason)) = (user_id, reason) else {
            return Err(violations.into_status());
        };
        let user = self.service.disable_user(user_id, reason, by).await?;
        Ok(Response::new(proto::DisableUserResponse { user: Some(user.into()) }))
    }

    async fn enable_user(
        &self,
        request: Request<proto::EnableUserRequest>,
    ) -> Result<Response<proto::EnableUserResponse>, Status> {
        let by = administrator(&request)?;
        let user_id = single_field(id("user_id", &request.into_inner().user_id))?;
        let user = self.service.enable_user(user_id, by).await?;
        Ok(Response::new(proto::EnableUserResponse { user: Some(user.into()) }))
    }

    async fn revoke_user_sessions(
        &self,
        request: Request<proto::RevokeUserSessionsRequest>,
    ) -> Result<Response<proto::RevokeUserSessionsResponse>, Status> {
        let by = administrator(&request)?;
        let user_id = single_field(id("user_id", &request.into_inner().user_id))?;
        let count = self.service.revoke_user_sessions(user_id, by).await?;
        let revoked_count = i32::try_from(count).unwrap_or(i32::MAX);
        Ok(Response::new(proto::RevokeUserSessionsResponse { revoked_count }))
    }

    async fn delete_user(
        &self,
        request: Request<proto::DeleteUserRequest>,
    ) -> Result<Response<proto::DeleteUserResponse>, Status> {
        let by = administrator(&request)?;
        let user_id = single_field(id("user_id", &request.into_inner().user_id))?;
        self.service.delete_user(user_id, by).await?;
        Ok(Response::new(proto::DeleteUserResponse {}))
    }

    async fn list_audit_events(
        &self,
        request: Request<proto::ListAuditEventsRequest>,
    ) -> Result<Response<proto::ListAuditEventsResponse>, Status> {
        let proto::ListAuditEventsRequest { page_size: size, page_token, user_id, action } = request.into_inner();
        let mut violations = Violations::default();
        let size = violations.collect(page_size(size));
        let user_id: Option<Option<UserId>> = violations.collect(filter(&user_id, |text| id("user_id", text)));
        let action = violations.collect(filter(&action, known_action));
        let (Some(size), Some(user_id), Some(action)) = (size, user_id, action) else {
            return Err(violations.into_status());
        };
        let page = self.service.list_audit_events(size, &page_token, user_id, action).await?;
        Ok(Response::new(proto::ListAuditEventsResponse {
            events: page.entries.into_iter().map(Into::into).collect(),
            next_page_token: page.next.unwrap_or_default(),
        }))
    }

    async fn create_service_account(
        &self,
        request: Request<proto::CreateServiceAccountRequest>,
    ) -> Result<Response<proto::CreateServiceAccountResponse>, Status> {
        let by = administrator(&request)?;
        let proto::CreateServiceAccountRequest { name, roles: names } = request.into_inner();
        let mut violations = Violations::default();
        let name = violations.collect(ServiceName::parse(&name));
        let roles = violations.collect(roles(&names));
        let (Some(name), Some(roles)) = (name, roles) else {
            return Err(violations.into_status());
        };
        let service_account = Some(self.service.create_service(name, roles, by).await?.into());
        Ok(Response::new(proto::CreateServiceAccountResponse { service_account }))
    }

    async fn list_service_accounts(
        &self,
        request: Request<proto::ListServiceAccountsRequest>,
    ) -> Result<Response<proto::ListServiceAccountsResponse>, Status> {
        let proto::ListServiceAccountsRequest { page_size: size, page_token } = request.into_inner();
        let page = self.service.list_services(single_field(page_size(size))?, &page_token).await?;
        Ok(Response::new(proto::ListServiceAccountsResponse {
            service_accounts: page.entries.into_iter().map(Into::into).collect(),
            next_page_token: page.next.unwrap_or_default(),
        }))
    }

    async fn get_service_account(
        &self,
        request: Request<proto::GetServiceAccountRequest>,
    ) -> Result<Response<proto::GetServiceAccountResponse>, Status> {
        let id = service_account_id(&request.into_inner().service_account_id)?;
        let service_account = Some(self.service.service(id).await?.into());
        Ok(Response::new(proto::GetServiceAccountResponse { service_account }))
    }

    async fn set_service_account_roles(
        &self,
        request: Request<proto::SetServiceAccountRolesRequest>,
    ) -> Result<Response<proto::SetServiceAccountRolesResponse>, Status> {
        let by = administrator(&request)?;
        let proto::SetServiceAccountRolesRequest { service_account_id, roles: names } = request.into_inner();
        let mut violations = Violations::default();
        let account = violations.collect(id("service_account_id", &service_account_id));
        let roles = violations.collect(roles(&names));
        let (Some(account), Some(roles)) = (account, roles) else {
            return Err(violations.into_status());
        };
        let service_account = Some(self.service.set_service_roles(account, roles, by).await?.into());
        Ok(Response::new(proto::SetServiceAccountRolesResponse { service_account }))
    }

    async fn disable_service_account(
        &self,
        request: Request<proto::DisableServiceAccountRequest>,
    ) -> Result<Response<proto::DisableServiceAccountResponse>, Status> {
        let by = administrator(&request)?;
        let proto::DisableServiceAccountRequest { service_account_id, reason: text } = request.into_inner();
        let mut violations = Violations::default();
        let account = violations.collect(id("service_account_id", &service_account_id));
        let reason = violations.collect(reason(text));
        let (Some(account), Some(reason)) = (account, reason) else {
            return Err(violations.into_status());
        };
        let service_account = Some(self.service.disable_service(account, reason, by).await?.into());
        Ok(Response::new(proto::DisableServiceAccountResponse { service_account }))
    }

    async fn enable_service_account(
        &self,
        request: Request<proto::EnableServiceAccountRequest>,
    ) -> Result<Response<proto::EnableServiceAccountResponse>, Status> {
        let by = administrator(&request)?;
        let id = service_account_id(&request.into_inner().service_account_id)?;
        let service_account = Some(self.service.enable_service(id, by).await?.into());
        Ok(Response::new(proto::EnableServiceAccountResponse { service_account }))
    }

    async fn delete_service_account(
        &self,
        request: Request<proto::DeleteServiceAccountRequest>,
    ) -> Result<Response<proto::DeleteServiceAccountResponse>, Status> {
        let by = administrator(&request)?;
        let id = service_account_id(&request.into_inner().service_account_id)?;
        self.service.delete_service(id, by).await?;
        Ok(Response::new(proto::DeleteServiceAccountResponse {}))
    }

    async fn create_service_key(
        &self,
        request: Request<proto::CreateServiceKeyRequest>,
    ) -> Result<Response<proto::CreateServiceKeyResponse>, Status> {
        let by = administrator(&request)?;
        let proto::CreateServiceKeyRequest { service_account_id, description: text, expire_time } =
            request.into_inner();
        let mut violations = Violations::default();
        let account = violations.collect(id("service_account_id", &service_account_id));
        let description = violations.collect(description(text));
        let expire_time = violations.collect(expire_time.map(|time| moment("expire_time", time)).transpose());
        let (Some(account), Some(description), Some(expire_time)) = (account, description, expire_time) else {
            return Err(violations.into_status());
        };
        let (key, secret) = self.service.create_service_key(account, description, expire_time, by).await?;
        let client_secret = secret.expose().to_owned();
        Ok(Response::new(proto::CreateServiceKeyResponse { key: Some(key.into()), client_secret }))
    }

    async fn list_service_keys(
        &self,
        request: Request<proto::ListServiceKeysRequest>,
    ) -> Result<Response<proto::ListServiceKeysResponse>, Status> {
        let id = service_account_id(&request.into_inner().service_account_id)?;
        let keys = self.service.list_service_keys(id).await?.into_iter().map(Into::into).collect();
        Ok(Response::new(proto::ListServiceKeysResponse { keys }))
    }

    async fn delete_service_key(
        &self,
        request: Request<proto::DeleteServiceKeyRequest>,
    ) -> Result<Response<proto::DeleteServiceKeyResponse>, Status> {
        let by = administrator(&request)?;
        let proto::DeleteServiceKeyRequest { service_account_id, key_id } = request.into_inner();
        let mut violations = Violations::default();
        let account = violations.collect(id("service_account_id", &service_account_id));
        let key = violations.collect(id("key_id", &key_id));
        let (Some(account), Some(key)) = (account, key) else {
            return Err(violations.into_status());
        };
        self.service.delete_service_key(account, key, by).await?;
        Ok(Response::new(proto::DeleteServiceKeyResponse {}))
    }
}

fn service_account_id(text: &str) -> Result<ServiceAccountId, Error> {
    single_field(id("service_account_id", text))
}

impl From<ServiceAccount> for proto::ServiceAccount {
    fn from(account: ServiceAccount) -> Self {
        Self {
            id: account.id.to_string(),
            name: account.name.as_str().to_owned(),
            roles: account.roles.iter().map(|role| role.as_str().to_owned()).collect(),
            disabled: account.disabled,
            create_time: Some(timestamp(account.create_time)),
            update_time: Some(timestamp(account.update_time)),
        }
    }
}

impl From<ServiceKey> for proto::ServiceKey {
    fn from(key: ServiceKey) -> Self {
        Self {
            id: key.id.to_string(),
            service_account_id: key.account.to_string(),
            description: key.description,
            create_time: Some(timestamp(key.create_time)),
            expire_time: key.expire_time.map(timestamp),
            last_use_time: key.last_use_time.map(timestamp),
        }
    }
}

fn administrator<T>(request: &Request<T>) -> Result<Administrator, Error> {
    Ok(Administrator::new(caller(request)?, &client(request)))
}

/// An empty filter matches every event.
fn filter<T>(text: &str, parse: impl FnOnce(&str) -> Result<T, FieldViolation>) -> Result<Option<T>, FieldViolation> {
    if text.is_empty() { Ok(None) } else { parse(text).map(Some) }
}

fn known_action(name: &str) -> Result<Action, FieldViolation> {
    Action::parse(name).ok_or_else(|| {
        FieldViolation::new("action", FieldReason::Malformed, "is not the name of an action, such as login")
    })
}

impl From<AuditEvent> for proto::AuditEvent {
    fn from(event: AuditEvent) -> Self {
        Self {
            id: event.id.to_string(),
            create_time: Some(timestamp(event.create_time)),
            action: event.action,
            actor_id: event.actor.map(|id| id.to_string()).unwrap_or_default(),
            user_id: event.user.map(|id| id.to_string()).unwrap_or_default(),
            session_id: event.session.map(|id| id.to_string()).unwrap_or_default(),
            client_ip: event.client_ip.unwrap_or_default(),
            detail: event.detail.unwrap_or_default(),
        }
    }
}
