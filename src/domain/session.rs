//! Sessions: opened by login, carried on by refresh, ended by logout. One row each, one live refresh token each.
//! Which presented generation means what is decided in the store's single step (`Store::rotate_refresh`), because only
//! there can it be decided once.

use std::{net::IpAddr, time::Duration};

use time::OffsetDateTime;

use crate::{
    error::Error,
    store::{Logout, LogoutOutcome, NewSession, RefreshHash, Rehash, Rotation, RotationOutcome, SessionOpening},
};

use super::{
    Deadline, Postern, SessionId, UserId,
    account::{Email, User},
    hasher::Verification,
    password::Password,
    token::{Minted, RefreshGrant, whole_seconds},
};

/// How long sessions and their refresh tokens live.
#[derive(Debug, Clone)]
pub struct SessionPolicy {
    /// How long a refresh token lives from its minting.
    pub refresh_ttl: Duration,
    /// How long a session lives, however often it is refreshed.
    pub max_lifetime: Duration,
    /// How long after a rotation the token before it still yields the same answer, by the database's clock.
    pub retry_window: Duration,
    /// Whether login demands a verified address.
    pub require_verified_email: bool,
}

/// Where a login came from, for the account's owner to recognise.
#[derive(Debug, Clone, Default)]
pub struct Client {
    pub ip: Option<IpAddr>,
    /// Printable, at most 256 characters.
    pub user_agent: Option<String>,
}

/// The tokens of a session, as its client holds them.
#[derive(Debug)]
pub struct TokenPair {
    pub access: Minted,
    pub refresh: Minted,
}

/// A session, as its owner sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionSummary {
    pub id: SessionId,
    pub create_time: OffsetDateTime,
    pub last_refresh_time: OffsetDateTime,
    pub expire_time: OffsetDateTime,
    pub client_ip: Option<String>,
    pub user_agent: Option<String>,
}

impl Postern {
    /// Opens a session.
    ///
    /// Wrong password, unknown email and disabled account walk the same way: one guess reserved, one look-up, one hash,
    /// one row in the audit, one answer.
    pub async fn login(
        &self,
        email: &Email,
        password: Password,
        client: Client,
        deadline: Deadline,
    ) -> Result<(TokenPair, User), Error> {
        let attempt = self.reserve_guess(email, &client).await?;
        let account = self.store.credentials(email).await?;
        let stored = account.as_ref().map(|account| account.password_hash.clone());
        let verification = self.guess(attempt, password, stored, deadline).await?;
        let user_id = account.as_ref().map(|account| account.user.id);
        let (account, rehash) = match (account, verification) {
            (Some(account), Verification::Match { rehash }) if !account.user.disabled => (account, rehash),
            (Some(_) | None, Verification::Match { rehash: _ } | Verification::Mismatch) => {
                self.store.login_failed(user_id, self.occasion(None, client.ip)?).await?;
                return Err(Error::InvalidCredentials);
            }
        };
        if self.sessions.require_verified_email && !account.user.email_verified {
            // The password was right: this was no guess.
            self.store.guess_was_right(attempt).await?;
            return Err(Error::EmailNotVerified);
        }
        let (mut session, refresh) = self.new_session(account.user.id, account.password_version, client)?;
        session.rehash = rehash.map(|to| Rehash { from: account.password_hash, to });
        session.attempt = Some(attempt);
        let session_id = session.grant.session_id;
        match self.store.open_session(session).await? {
            SessionOpening::Opened(user) => {
                metrics::counter!("postern_sessions_opened_total").increment(1);
                let access = self.tokens.mint_access(&user, session_id, &self.env)?;
                Ok((TokenPair { access, refresh }, user))
            }
            // While the password was being hashed it was changed, or the account disabled or deleted.
            SessionOpening::Refused => Err(Error::InvalidCredentials),
        }
    }

    /// A session to open now, and its first refresh token.
    pub(super) fn new_session(
        &self,
        user_id: UserId,
        password_version: i64,
        client: Client,
    ) -> Result<(NewSession, Minted), Error> {
        let occasion = self.occasion(Some(user_id), client.ip)?;
        let now = occasion.now;
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
            rehash: None,
            user_agent: client.user_agent,
            attempt: None,
            occasion,
        };
        Ok((session, refresh))
    }

    /// Exchanges a refresh token for the next pair.
    pub async fn refresh(&self, refresh_token: &str, client: &Client) -> Result<TokenPair, Error> {
        let occasion = self.occasion(None, client.ip)?;
        let now = occasion.now;
        // Its expiry is judged with its session: an expired token that was used up is still a thief's.
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
            next,
            next_hash: RefreshHash::of(&refresh.token),
            occasion,
            retry_window: self.sessions.retry_window,
        };
        let outcome = self.store.rotate_refresh(rotation).await?;
        metrics::counter!("postern_refreshes_total", "outcome" => outcome.name()).increment(1);
        let (user, refresh) = match outcome {
            RotationOutcome::Rotated(user) => (user, refresh),
            RotationOutcome::Retried { user, grant, hash } => {
                // The client lost our answer, or two of its calls raced: give the winner's token again.
                let again = self.tokens.mint_refresh(&grant)?;
                if RefreshHash::of(&again.token) != hash {
                    // Minted under another issuer or master key: it cannot be given again.
                    tracing::warn!(session_id = %grant.session_id, "a refresh token cannot be minted again as it was");
                    return Err(Error::RefreshTokenInvalid);
                }
                (user, again)
            }
            RotationOutcome::Reused => {
                self.spread().await;
                tracing::warn!(session_id = %presented.session_id, user_id = %presented.user_id,
                    generation = presented.generation, "a used refresh token came back: its session was ended");
                return Err(Error::RefreshTokenInvalid);
            }
            RotationOutcome::Dead => return Err(Error::RefreshTokenInvalid),
        };
        let access = self.tokens.mint_access(&user, presented.session_id, &self.env)?;
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
            occasion: self.occasion(None, client.ip)?,
        };
        match self.store.logout(logout).await? {
            LogoutOutcome::LoggedOut => {
                self.spread().await;
                Ok(())
            }
            LogoutOutcome::Refused => Err(Error::RefreshTokenInvalid),
        }
    }

    fn refresh_expiry(&self, now: OffsetDateTime, session_end_time: OffsetDateTime) -> OffsetDateTime {
        whole_seconds(now + self.sessions.refresh_ttl).min(session_end_time)
    }
}
