//! `TokenService`: each RPC parses its request, calls the domain once, and converts the result to a reply.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use crate::{
    domain::{
        role::{Caller, Role},
        service::Service,
        service_account::ClientSecret,
        token::VerifiedToken,
    },
    proto::{self, SubjectType, token_service_server::TokenService},
};

use super::{
    request::{Violations, client, required, single_field, timestamp},
    watch::{self, Revocations},
};

/// The RPCs of `TokenService`.
#[derive(Debug, Clone)]
pub struct TokenRpcs {
    service: Arc<Service>,
}

impl TokenRpcs {
    pub fn new(service: Arc<Service>) -> Self {
        Self { service }
    }
}

#[tonic::async_trait]
impl TokenService for TokenRpcs {
    type WatchRevocationsStream = Revocations;

    async fn introspect_token(
        &self,
        request: Request<proto::IntrospectTokenRequest>,
    ) -> Result<Response<proto::IntrospectTokenResponse>, Status> {
        let token = single_field(required("token", request.into_inner().token))?;
        let found = self.service.introspect(&token)?;
        Ok(Response::new(found.map(|(token, caller)| active(&token, &caller)).unwrap_or_default()))
    }

    async fn revoke_token(
        &self,
        request: Request<proto::RevokeTokenRequest>,
    ) -> Result<Response<proto::RevokeTokenResponse>, Status> {
        let client = client(&request);
        let token = single_field(required("token", request.into_inner().token))?;
        self.service.revoke_token(&token, &client).await?;
        Ok(Response::new(proto::RevokeTokenResponse {}))
    }

    async fn issue_service_token(
        &self,
        request: Request<proto::IssueServiceTokenRequest>,
    ) -> Result<Response<proto::IssueServiceTokenResponse>, Status> {
        let client = client(&request);
        let proto::IssueServiceTokenRequest { client_id, client_secret } = request.into_inner();
        let mut violations = Violations::default();
        let client_id = violations.collect(required("client_id", client_id));
        let secret = violations.collect(ClientSecret::presented(client_secret));
        let (Some(client_id), Some(secret)) = (client_id, secret) else {
            return Err(violations.into_status());
        };
        let token = self.service.issue_service_token(client_id.parse().ok(), &secret, &client).await?;
        Ok(Response::new(proto::IssueServiceTokenResponse {
            access_token: token.token,
            access_token_expire_time: Some(timestamp(token.expire_time)),
            token_type: "Bearer".to_owned(),
        }))
    }

    async fn watch_revocations(
        &self,
        request: Request<proto::WatchRevocationsRequest>,
    ) -> Result<Response<Revocations>, Status> {
        watch::revocations(Arc::clone(&self.service), request).await
    }
}

fn active(token: &VerifiedToken, caller: &Caller) -> proto::IntrospectTokenResponse {
    let subject_type = match caller {
        Caller::Person(_) => SubjectType::User,
        Caller::Service(_) => SubjectType::Service,
    };
    let email = token.account.email.clone();
    proto::IntrospectTokenResponse {
        active: true,
        subject: caller.id().to_string(),
        subject_type: subject_type.into(),
        client_id: token.account.client_id.clone(),
        session_id: caller.session().to_string(),
        username: token.account.username.clone(),
        email_verified: email.as_ref().is_some_and(|email| email.is_verified),
        email: email.map(|email| email.address).unwrap_or_default(),
        roles: caller.roles().iter().map(Role::to_string).collect(),
        issue_time: Some(timestamp(token.issue_time)),
        expire_time: Some(timestamp(token.expire_time)),
    }
}
