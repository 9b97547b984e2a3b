//! `AuthService`: each RPC parses its request, makes one call to the domain, and dresses the reply.

use std::{sync::Arc, time::Instant};

use http::header::USER_AGENT;
use prost_types::Timestamp;
use time::OffsetDateTime;
use tonic::{Request, Response, Status};

use crate::{
    domain::{
        Deadline, Postern,
        account::{Email, SignUp, User, Username},
        password::Password,
        role::Caller,
        session::{Client, TokenPair},
    },
    error::{Error, FieldViolation},
    listen::Peer,
    proto::{self, auth_service_server::AuthService},
};

use super::limits::LONGEST_CALL;

/// The longest user agent that is kept, in characters.
const MAX_USER_AGENT: usize = 256;

/// The service, over the domain.
#[derive(Debug, Clone)]
pub struct AuthRpcs {
    postern: Arc<Postern>,
}

impl AuthRpcs {
    pub fn new(postern: Arc<Postern>) -> Self {
        Self { postern }
    }
}

#[tonic::async_trait]
impl AuthService for AuthRpcs {
    async fn sign_up(&self, request: Request<proto::SignUpRequest>) -> Result<Response<proto::SignUpResponse>, Status> {
        let deadline = deadline(&request);
        let proto::SignUpRequest { username, email, password } = request.into_inner();
        let mut fields = Fields::default();
        let account_words = [username.as_str(), email.as_str()];
        let parsed_username = fields.take(Username::parse(&username));
        let parsed_email = fields.take(Email::parse(&email));
        let password = fields.take(
            Password::parse("password", password)
                .and_then(|password| self.postern.accept_password("password", password, &account_words)),
        );
        let (Some(username), Some(email), Some(password)) = (parsed_username, parsed_email, password) else {
            return Err(fields.refuse());
        };
        let user = self.postern.sign_up(SignUp { username, email, password }, deadline).await?;
        Ok(Response::new(proto::SignUpResponse { user: Some(user.into()) }))
    }

    async fn login(&self, request: Request<proto::LoginRequest>) -> Result<Response<proto::LoginResponse>, Status> {
        let deadline = deadline(&request);
        let client = client(&request);
        let proto::LoginRequest { email, password } = request.into_inner();
        let mut fields = Fields::default();
        let email = fields.take(Email::parse(&email));
        let password = fields.take(Password::parse("password", password));
        let (Some(email), Some(password)) = (email, password) else {
            return Err(fields.refuse());
        };
        let (tokens, user) = self.postern.login(&email, password, client, deadline).await?;
        Ok(Response::new(proto::LoginResponse { tokens: Some(tokens.into()), user: Some(user.into()) }))
    }

    async fn refresh(
        &self,
        request: Request<proto::RefreshRequest>,
    ) -> Result<Response<proto::RefreshResponse>, Status> {
        let refresh_token = present(request.into_inner().refresh_token)?;
        let tokens = self.postern.refresh(&refresh_token).await?;
        Ok(Response::new(proto::RefreshResponse { tokens: Some(tokens.into()) }))
    }

    async fn logout(&self, request: Request<proto::LogoutRequest>) -> Result<Response<proto::LogoutResponse>, Status> {
        let proto::LogoutRequest { refresh_token, everywhere } = request.into_inner();
        let refresh_token = present(refresh_token)?;
        self.postern.logout(&refresh_token, everywhere).await?;
        Ok(Response::new(proto::LogoutResponse {}))
    }

    async fn get_me(&self, request: Request<proto::GetMeRequest>) -> Result<Response<proto::GetMeResponse>, Status> {
        let user = self.postern.me(caller(&request)?).await?;
        Ok(Response::new(proto::GetMeResponse { user: Some(user.into()) }))
    }
}

/// Collects what is wrong with a request, so that all of it is said at once.
#[derive(Default)]
struct Fields(Vec<FieldViolation>);

impl Fields {
    fn take<T>(&mut self, parsed: Result<T, FieldViolation>) -> Option<T> {
        parsed.map_err(|violation| self.0.push(violation)).ok()
    }

    fn refuse(self) -> Status {
        Error::InvalidFields(self.0).into()
    }
}

/// A token that is missing is a missing field; one that is anything else, the domain judges.
fn present(refresh_token: String) -> Result<String, Error> {
    if refresh_token.is_empty() {
        return Err(Error::field("refresh_token", "is required"));
    }
    Ok(refresh_token)
}

/// By when the answer is wanted, as the limits layer found.
fn deadline<T>(request: &Request<T>) -> Deadline {
    request.extensions().get().copied().unwrap_or_else(|| Deadline(Instant::now() + LONGEST_CALL))
}

/// Whom the access layer let in.
fn caller<T>(request: &Request<T>) -> Result<&Caller, Error> {
    request.extensions().get().ok_or_else(|| Error::internal("the access layer let nobody in particular pass"))
}

/// Where a call comes from.
fn client<T>(request: &Request<T>) -> Client {
    let user_agent = request.metadata().get(USER_AGENT.as_str()).and_then(|value| value.to_str().ok());
    Client {
        ip: request.extensions().get::<Peer>().map(|peer| peer.0.ip()),
        user_agent: user_agent.map(|text| text.chars().filter(|c| !c.is_control()).take(MAX_USER_AGENT).collect()),
    }
}

impl From<User> for proto::User {
    fn from(user: User) -> Self {
        Self {
            id: user.id.to_string(),
            username: user.username.as_str().to_owned(),
            email: user.email.as_str().to_owned(),
            email_verified: user.email_verified,
            roles: user.roles.iter().map(|role| role.as_str().to_owned()).collect(),
            disabled: user.disabled,
            create_time: Some(timestamp(user.create_time)),
            update_time: Some(timestamp(user.update_time)),
        }
    }
}

impl From<TokenPair> for proto::TokenPair {
    fn from(tokens: TokenPair) -> Self {
        Self {
            access_token: tokens.access.token,
            access_token_expire_time: Some(timestamp(tokens.access.expire_time)),
            refresh_token: tokens.refresh.token,
            refresh_token_expire_time: Some(timestamp(tokens.refresh.expire_time)),
            token_type: "Bearer".to_owned(),
        }
    }
}

fn timestamp(time: OffsetDateTime) -> Timestamp {
    Timestamp { seconds: time.unix_timestamp(), nanos: time.nanosecond().cast_signed() }
}
