//! `AdminService`: each RPC parses its request, calls the domain once, and converts the result to a reply.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use crate::{
    domain::{
        admin::{Administrator, page_size, reason, role_set, search_text},
        audit::{Action, AuditEvent},
        ids::UserId,
        service::Service,
    },
    error::{Error, FieldViolation},
    proto::{self, admin_service_server::AdminService},
};

use super::request::{Violations, caller, client, id, single_field, timestamp};

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
}

fn administrator<T>(request: &Request<T>) -> Result<Administrator, Error> {
    Ok(Administrator::new(caller(request)?, &client(request)))
}

/// An empty filter matches every event.
fn filter<T>(text: &str, parse: impl FnOnce(&str) -> Result<T, FieldViolation>) -> Result<Option<T>, FieldViolation> {
    if text.is_empty() { Ok(None) } else { parse(text).map(Some) }
}

fn known_action(name: &str) -> Result<Action, FieldViolation> {
    Action::parse(name).ok_or_else(|| FieldViolation::new("action", "is not the name of an action, such as login"))
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
