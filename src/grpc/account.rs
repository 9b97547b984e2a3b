//! `AccountService`: each RPC parses its request, calls the domain once, and converts the result to a reply.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use crate::{
    domain::{
        account::Email, admin::page_size, ids::SessionId, password::Password, service::Service, session::SessionSummary,
    },
    proto::{self, account_service_server::AccountService},
};

use super::request::{Violations, client, deadline, id, optional_person, person, required, single_field, timestamp};

/// The RPCs of `AccountService`.
#[derive(Debug, Clone)]
pub struct AccountRpcs {
    service: Arc<Service>,
}

impl AccountRpcs {
    pub fn new(service: Arc<Service>) -> Self {
        Self { service }
    }
}

#[tonic::async_trait]
impl AccountService for AccountRpcs {
    async fn verify_email(
        &self,
        request: Request<proto::VerifyEmailRequest>,
    ) -> Result<Response<proto::VerifyEmailResponse>, Status> {
        let (client, caller) = (client(&request), optional_person(&request).cloned());
        let token = single_field(required("token", request.into_inner().token))?;
        let user = self.service.verify_email(&token, caller.as_ref(), &client).await?;
        Ok(Response::new(proto::VerifyEmailResponse { user: Some(user.into()) }))
    }

    async fn resend_verification_email(
        &self,
        request: Request<proto::ResendVerificationEmailRequest>,
    ) -> Result<Response<proto::ResendVerificationEmailResponse>, Status> {
        let client = client(&request);
        let email = single_field(Email::parse(&request.into_inner().email))?;
        self.service.resend_verification_email(email, &client).await?;
        Ok(Response::new(proto::ResendVerificationEmailResponse {}))
    }

    async fn request_password_reset(
        &self,
        request: Request<proto::RequestPasswordResetRequest>,
    ) -> Result<Response<proto::RequestPasswordResetResponse>, Status> {
        let client = client(&request);
        let email = single_field(Email::parse(&request.into_inner().email))?;
        self.service.request_password_reset(email, &client).await?;
        Ok(Response::new(proto::RequestPasswordResetResponse {}))
    }

    async fn reset_password(
        &self,
        request: Request<proto::ResetPasswordRequest>,
    ) -> Result<Response<proto::ResetPasswordResponse>, Status> {
        let (deadline, client) = (deadline(&request), client(&request));
        let proto::ResetPasswordRequest { token, new_password } = request.into_inner();
        let mut violations = Violations::default();
        let token = violations.collect(required("token", token));
        let new_password = violations.collect(Password::parse("new_password", new_password));
        let (Some(token), Some(new_password)) = (token, new_password) else {
            return Err(violations.into_status());
        };
        self.service.reset_password(&token, new_password, &client, deadline).await?;
        Ok(Response::new(proto::ResetPasswordResponse {}))
    }

    async fn change_password(
        &self,
        request: Request<proto::ChangePasswordRequest>,
    ) -> Result<Response<proto::ChangePasswordResponse>, Status> {
        let (deadline, client, caller) = (deadline(&request), client(&request), person(&request)?.clone());
        let proto::ChangePasswordRequest { current_password, new_password } = request.into_inner();
        let mut violations = Violations::default();
        let current = violations.collect(Password::parse("current_password", current_password));
        let new = violations.collect(Password::parse("new_password", new_password));
        let (Some(current), Some(new)) = (current, new) else {
            return Err(violations.into_status());
        };
        let tokens = self.service.change_password(&caller, current, new, client, deadline).await?;
        Ok(Response::new(proto::ChangePasswordResponse { tokens: Some(tokens.into()) }))
    }

    async fn request_email_change(
        &self,
        request: Request<proto::RequestEmailChangeRequest>,
    ) -> Result<Response<proto::RequestEmailChangeResponse>, Status> {
        let (deadline, client, caller) = (deadline(&request), client(&request), person(&request)?.clone());
        let proto::RequestEmailChangeRequest { new_email, password } = request.into_inner();
        let mut violations = Violations::default();
        let new_email = violations.collect(Email::parse(&new_email).map_err(|violation| violation.of("new_email")));
        let password = violations.collect(Password::parse("password", password));
        let (Some(new_email), Some(password)) = (new_email, password) else {
            return Err(violations.into_status());
        };
        self.service.request_email_change(&caller, new_email, password, &client, deadline).await?;
        Ok(Response::new(proto::RequestEmailChangeResponse {}))
    }

    async fn confirm_email_change(
        &self,
        request: Request<proto::ConfirmEmailChangeRequest>,
    ) -> Result<Response<proto::ConfirmEmailChangeResponse>, Status> {
        let client = client(&request);
        let token = single_field(required("token", request.into_inner().token))?;
        let user = self.service.confirm_email_change(&token, &client).await?;
        Ok(Response::new(proto::ConfirmEmailChangeResponse { user: Some(user.into()) }))
    }

    async fn change_username(
        &self,
        request: Request<proto::ChangeUsernameRequest>,
    ) -> Result<Response<proto::ChangeUsernameResponse>, Status> {
        let (deadline, client, caller) = (deadline(&request), client(&request), person(&request)?.clone());
        let proto::ChangeUsernameRequest { new_username, password } = request.into_inner();
        let mut violations = Violations::default();
        let new_username = violations.collect(self.service.chosen_username("new_username", &new_username));
        let password = violations.collect(Password::parse("password", password));
        let (Some(new_username), Some(password)) = (new_username, password) else {
            return Err(violations.into_status());
        };
        let user = self.service.change_username(&caller, new_username, password, &client, deadline).await?;
        Ok(Response::new(proto::ChangeUsernameResponse { user: Some(user.into()) }))
    }

    async fn list_sessions(
        &self,
        request: Request<proto::ListSessionsRequest>,
    ) -> Result<Response<proto::ListSessionsResponse>, Status> {
        let caller = person(&request)?.clone();
        let proto::ListSessionsRequest { page_size: size, page_token } = request.into_inner();
        let size = single_field(page_size(size))?;
        let page = self.service.list_sessions(&caller, size, &page_token).await?;
        Ok(Response::new(proto::ListSessionsResponse {
            sessions: page.entries.into_iter().map(|session| session_to_proto(session, caller.session_id)).collect(),
            next_page_token: page.next.unwrap_or_default(),
        }))
    }

    async fn revoke_session(
        &self,
        request: Request<proto::RevokeSessionRequest>,
    ) -> Result<Response<proto::RevokeSessionResponse>, Status> {
        let (client, caller) = (client(&request), person(&request)?.clone());
        let session_id = single_field(id("session_id", &request.into_inner().session_id))?;
        self.service.revoke_session(&caller, session_id, &client).await?;
        Ok(Response::new(proto::RevokeSessionResponse {}))
    }

    async fn delete_account(
        &self,
        request: Request<proto::DeleteAccountRequest>,
    ) -> Result<Response<proto::DeleteAccountResponse>, Status> {
        let (deadline, client, caller) = (deadline(&request), client(&request), person(&request)?.clone());
        let password = single_field(Password::parse("password", request.into_inner().password))?;
        self.service.delete_account(&caller, password, &client, deadline).await?;
        Ok(Response::new(proto::DeleteAccountResponse {}))
    }
}

/// Converts a session. `current` is set for the session that the caller uses.
fn session_to_proto(session: SessionSummary, current: SessionId) -> proto::Session {
    proto::Session {
        id: session.id.to_string(),
        create_time: Some(timestamp(session.create_time)),
        last_refresh_time: Some(timestamp(session.last_refresh_time)),
        expire_time: Some(timestamp(session.expire_time)),
        client_ip: session.client_ip.unwrap_or_default(),
        user_agent: session.user_agent.unwrap_or_default(),
        current: session.id == current,
    }
}
