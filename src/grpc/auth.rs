//! `AuthService`: each RPC parses its request, calls the domain once, and converts the result to a reply.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use crate::{
    domain::{
        account::{Email, SignUp},
        password::Password,
        service::Service,
    },
    proto::{self, auth_service_server::AuthService},
};

use super::request::{Violations, client, deadline, person, required, single_field};

/// The RPCs of `AuthService`.
#[derive(Debug, Clone)]
pub struct AuthRpcs {
    service: Arc<Service>,
}

impl AuthRpcs {
    pub fn new(service: Arc<Service>) -> Self {
        Self { service }
    }
}

#[tonic::async_trait]
impl AuthService for AuthRpcs {
    async fn sign_up(&self, request: Request<proto::SignUpRequest>) -> Result<Response<proto::SignUpResponse>, Status> {
        let (deadline, client) = (deadline(&request), client(&request));
        let proto::SignUpRequest { username, email, password } = request.into_inner();
        let mut violations = Violations::default();
        let username = violations.collect(self.service.chosen_username("username", &username));
        let email = violations.collect(Email::parse(&email));
        let (username, email, password) =
            match (username, email, violations.collect(Password::parse("password", password))) {
                (Some(username), Some(email), Some(password)) => (username, email, password),
                (_, _, Some(password)) => {
                    violations.collect(self.service.check_password_cheaply("password", &password));
                    return Err(violations.into_status());
                }
                (_, _, None) => return Err(violations.into_status()),
            };
        let user = self.service.sign_up(SignUp { username, email, password }, &client, deadline).await?;
        Ok(Response::new(proto::SignUpResponse { user: Some(user.into()) }))
    }

    async fn login(&self, request: Request<proto::LoginRequest>) -> Result<Response<proto::LoginResponse>, Status> {
        let deadline = deadline(&request);
        let client = client(&request);
        let proto::LoginRequest { email, password } = request.into_inner();
        let mut violations = Violations::default();
        let email = violations.collect(Email::parse(&email));
        let password = violations.collect(Password::parse("password", password));
        let (Some(email), Some(password)) = (email, password) else {
            return Err(violations.into_status());
        };
        let (tokens, user) = self.service.login(&email, password, client, deadline).await?;
        Ok(Response::new(proto::LoginResponse { tokens: Some(tokens.into()), user: Some(user.into()) }))
    }

    async fn refresh(
        &self,
        request: Request<proto::RefreshRequest>,
    ) -> Result<Response<proto::RefreshResponse>, Status> {
        let client = client(&request);
        let refresh_token = single_field(required("refresh_token", request.into_inner().refresh_token))?;
        let tokens = self.service.refresh(&refresh_token, &client).await?;
        Ok(Response::new(proto::RefreshResponse { tokens: Some(tokens.into()) }))
    }

    async fn logout(&self, request: Request<proto::LogoutRequest>) -> Result<Response<proto::LogoutResponse>, Status> {
        let client = client(&request);
        let proto::LogoutRequest { refresh_token, everywhere } = request.into_inner();
        let refresh_token = single_field(required("refresh_token", refresh_token))?;
        self.service.logout(&refresh_token, everywhere, &client).await?;
        Ok(Response::new(proto::LogoutResponse {}))
    }

    async fn get_me(&self, request: Request<proto::GetMeRequest>) -> Result<Response<proto::GetMeResponse>, Status> {
        let user = self.service.me(person(&request)?).await?;
        Ok(Response::new(proto::GetMeResponse { user: Some(user.into()) }))
    }
}
