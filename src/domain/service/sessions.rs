//! Sessions: opened by login, continued by refresh, ended by logout; and who an access token identifies.

use std::{net::IpAddr, sync::Arc, time::Duration};

use jsonwebtoken::jwk::JwkSet;
use time::OffsetDateTime;

use crate::{
    domain::{
        account::{Email, User},
        env::Deadline,
        hasher::Verification,
        ids::{AuditEventId, SessionId, UserId},
        password::Password,
        ports::{
            Logout, LogoutOutcome, NewSession, Rehash, Rotation, RotationOutcome, SessionOpening, SurplusSessions,
        },
        role::Caller,
        session::{Client, RefreshGrant, RefreshHash},
        token::{AccessTokenError, Minted, TokenPair, VerifiedToken, whole_seconds},
    },
    error::Error,
};

use super::Service;

/// How many sessions that are too many end in one step, and the pause between two steps.
const SURPLUS_AT_ONCE: u32 = 20;
const SURPLUS_PAUSE: Duration = Duration::from_millis(20);

impl Service {
    /// The caller of an access token, with its current roles. Costs no I/O.
    pub fn identify(&self, access_token: &str) -> Result<Caller, AccessTokenError> {
        self.verified(access_token).map(|(_, caller)| caller)
    }

    /// What an access token says, and its caller with its current roles; `None` if it is not accepted. Costs no I/O. An error
    /// means that it is unknown whether the token was revoked.
    pub fn introspect(&self, access_token: &str) -> Result<Option<(Arc<VerifiedToken>, Caller)>, Error> {
        match self.verified(access_token) {
            Ok(found) => Ok(Some(found)),
            Err(AccessTokenError::RevocationUnknown) => Err(Error::RevocationsUnknown),
            Err(AccessTokenError::Invalid | AccessTokenError::Expired | AccessTokenError::Revoked) => Ok(None),
        }
    }

    /// Ends a token (RFC 7009). With the access token of a person, or a refresh token, its session ends; of a service only that
    /// token does. Whoever has a token may end it, and one that is not valid is as good as revoked.
    pub async fn revoke_token(&self, token: &str, client: &Client) -> Result<(), Error> {
        let revoked = match self.introspect(token)? {
            Some((_, Caller::Person(person))) => self.revoke_session(&person, person.session_id, client).await,
            Some((_, Caller::Service(service))) => self.revoke_service_token(&service, client).await,
            None => self.logout(token, false, client).await,
        };
        match revoked {
            Err(Error::NotFound(_) | Error::RefreshTokenInvalid) => Ok(()),
            revoked => revoked,
        }
    }

    pub(super) fn verified(&self, access_token: &str) -> Result<(Arc<VerifiedToken>, Caller), AccessTokenError> {
        let token = self.tokens.verify_access(access_token, self.env.now())?;
        let caller = self.revocations.check(token.caller.clone())?;
        self.note_seen(&token);
        Ok((token, caller))
    }

    /// `iss` of every token.
    pub fn issuer(&self) -> &str {
        self.tokens.issuer()
    }

    /// `aud` of access tokens.
    pub fn audience(&self) -> &str {
        self.tokens.audience()
    }

    /// The public keys of access tokens.
    pub fn jwks(&self) -> JwkSet {
        self.tokens.jwks()
    }

    /// How long a verifier may keep the public keys.
    pub fn keys_max_age(&self) -> Duration {
        self.keyring.max_age()
    }

    /// The algorithms of the public keys.
    pub fn signing_algorithms(&self) -> Vec<String> {
        self.keyring.algorithms()
    }
}

impl Service {
    /// Opens a session.
    ///
    /// A wrong password, an unknown address and a disabled account take the same path: one place, one reserved attempt
    /// with one look-up, one hash, one failure with its audit row, one answer.
    pub async fn login(
        self: &Arc<Self>,
        email: &Email,
        password: Password,
        client: Client,
        deadline: Deadline,
    ) -> Result<(TokenPair, User), Error> {
        let subject = self.login_attempts.subject(email);
        let place = self.admit(client.ip, Some(subject), deadline).await?;
        let (attempt, account) = self.start_login(email, subject, deadline).await?;
        let stored = account.as_ref().map(|account| account.password_hash.clone());
        let verification = self.hasher.verify(&place, password, stored, deadline).await?;
        drop(place);
        let user_id = account.as_ref().map(|account| account.user.id);
        let (account, rehash) = match (account, verification) {
            (Some(account), Verification::Match { rehash }) if !account.user.disabled => (account, rehash),
            (Some(_) | None, Verification::Match { rehash: _ } | Verification::Mismatch) => {
                self.attempt_failed(attempt, user_id, None, &client).await?;
                return Err(Error::InvalidCredentials);
            }
        };
        if self.sessions.require_verified_email && !account.user.email_verified {
            // The password was right, so the attempt does not count as a failure.
            attempt.succeeded().await?;
            return Err(Error::EmailNotVerified);
        }
        let client_ip = client.ip;
        let (mut session, refresh) = self.new_session(account.user.id, account.password_version, client)?;
        session.rehash = rehash.map(|to| Rehash { from: account.password_hash, to });
        session.attempt = Some(attempt.into_subject());
        let session_id = session.grant.session_id;
        let opening = self.store.open_session(session).await?;
        if let SessionOpening::OpenedTooMany(user) = &opening {
            self.end_surplus_sessions(user.id, client_ip).await;
        }
        match opening {
            SessionOpening::Opened(user) | SessionOpening::OpenedTooMany(user) => {
                metrics::counter!("postern_sessions_opened_total").increment(1);
                let access = self.tokens.mint_access(&user, session_id, 0, &self.env)?;
                Ok((TokenPair { access, refresh }, user))
            }
            // The password was changed, or the account disabled or deleted, while the hash was computed. The attempt is
            // not settled; it is forgotten after a while.
            SessionOpening::Refused => Err(Error::InvalidCredentials),
        }
    }

    /// Ends the sessions of a user beyond the number that one may have, those first that were not used for the longest
    /// time. Normally that is one. Where it is many, because the limit was lowered, the caller does not wait for all. The
    /// new session is open, so an error only leaves the surplus to the next login.
    async fn end_surplus_sessions(self: &Arc<Self>, user: UserId, client_ip: Option<IpAddr>) {
        match self.end_some_surplus_sessions(user, client_ip).await {
            Ok(false) => {}
            Ok(true) => {
                let service = Arc::clone(self);
                tokio::spawn(async move {
                    while let Ok(true) = service.end_some_surplus_sessions(user, client_ip).await {
                        tokio::time::sleep(SURPLUS_PAUSE).await;
                    }
                });
            }
            Err(error) => tracing::debug!(%error, "surplus sessions were not ended"),
        }
    }

    /// `true` if there are still too many.
    async fn end_some_surplus_sessions(&self, user: UserId, client_ip: Option<IpAddr>) -> Result<bool, Error> {
        let events = (0..SURPLUS_AT_ONCE).map(|_| Ok(AuditEventId(self.env.uuid()?))).collect::<Result<_, Error>>()?;
        let context = self.audit_context(Some(user.into()), client_ip)?;
        let surplus = SurplusSessions { user, most: self.sessions.most_per_user, context, events };
        let more = self.store.end_surplus_sessions(surplus).await?;
        self.sync_revocations().await;
        Ok(more)
    }

    /// A new session, and its first refresh token.
    pub(super) fn new_session(
        &self,
        user_id: UserId,
        password_version: i64,
        client: Client,
    ) -> Result<(NewSession, Minted), Error> {
        let context = self.audit_context(Some(user_id.into()), client.ip)?;
        let now = context.now;
        let session_end_time = whole_seconds(now + self.sessions.max_lifetime);
        let grant = RefreshGrant {
            session_id: SessionId(self.env.uuid()?),
            user_id,
            generation: 0,
            issue_time: whole_seconds(now),
            expire_time: self.refresh_expiry(now, session_end_time),
            session_end_time,
        };
        let refresh = self.tokens.mint_refresh(&grant)?;
        let session = NewSession {
            grant,
            refresh_hash: RefreshHash::of(&refresh.token),
            password_version,
            most: self.sessions.most_per_user,
            rehash: None,
            user_agent: client.user_agent,
            attempt: None,
            context,
        };
        Ok((session, refresh))
    }

    /// Exchanges a refresh token for the next pair.
    pub async fn refresh(&self, refresh_token: &str, client: &Client) -> Result<TokenPair, Error> {
        let context = self.audit_context(None, client.ip)?;
        let now = context.now;
        // Expiry is checked with the session row: an expired token that was consumed must still end the session.
        let presented = self.tokens.verify_refresh(refresh_token).ok_or(Error::RefreshTokenInvalid)?;
        let next = RefreshGrant {
            generation: presented.generation.saturating_add(1),
            issue_time: whole_seconds(now),
            expire_time: self.refresh_expiry(now, presented.session_end_time),
            ..presented.clone()
        };
        let refresh = self.tokens.mint_refresh(&next)?;
        let rotation = Rotation {
            presented_generation: presented.generation,
            presented_hash: RefreshHash::of(refresh_token),
            presented_expire_time: presented.expire_time,
            next,
            next_hash: RefreshHash::of(&refresh.token),
            context,
            retry_window: self.sessions.retry_window,
            lost_answer_window: self.sessions.lost_answer_window,
            seen_generation: self.seen.newest(presented.session_id),
        };
        let outcome = self.store.rotate_refresh(rotation).await?;
        metrics::counter!("postern_refreshes_total", "outcome" => outcome.as_str()).increment(1);
        let (user, refresh) = match outcome {
            RotationOutcome::Rotated(user) => (user, refresh),
            RotationOutcome::Replayed { user, grant, hash } => {
                // The client lost our answer, or two of its calls raced: return the same successor again.
                let Some(again) = self.tokens.mint_refresh_again(&grant, hash)? else {
                    // It was minted with another issuer or master key.
                    tracing::warn!(session_id = %grant.session_id, "a refresh token could not be minted again with the same bytes");
                    return Err(Error::RefreshTokenInvalid);
                };
                (user, again)
            }
            RotationOutcome::Reused => {
                self.sync_revocations().await;
                tracing::warn!(session_id = %presented.session_id, user_id = %presented.user_id,
                    generation = presented.generation, "a consumed refresh token was presented: its session was ended");
                return Err(Error::RefreshTokenInvalid);
            }
            RotationOutcome::Invalid => return Err(Error::RefreshTokenInvalid),
        };
        let generation = presented.generation.saturating_add(1);
        let access = self.tokens.mint_access(&user, presented.session_id, generation, &self.env)?;
        Ok(TokenPair { access, refresh })
    }

    /// Ends the session of a refresh token, or with `everywhere` every session of its user.
    pub async fn logout(&self, refresh_token: &str, everywhere: bool, client: &Client) -> Result<(), Error> {
        let presented = self.tokens.verify_refresh(refresh_token).ok_or(Error::RefreshTokenInvalid)?;
        let logout = Logout {
            session_id: presented.session_id,
            user_id: presented.user_id,
            presented_generation: presented.generation,
            everywhere,
            context: self.audit_context(None, client.ip)?,
        };
        match self.store.logout(logout).await? {
            LogoutOutcome::LoggedOut => {
                self.sync_revocations().await;
                Ok(())
            }
            LogoutOutcome::Refused => Err(Error::RefreshTokenInvalid),
        }
    }

    fn refresh_expiry(&self, now: OffsetDateTime, session_end_time: OffsetDateTime) -> OffsetDateTime {
        whole_seconds(now + self.sessions.refresh_ttl).min(session_end_time)
    }
}
