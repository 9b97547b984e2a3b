//! Service accounts: their administration, and the tokens that they get for a secret.

use time::{OffsetDateTime, ext::NumericalDuration as _};

use crate::{
    domain::{
        admin::{Administrator, Page},
        ids::{ServiceAccountId, ServiceKeyId},
        ports::{KeyCreation, NewServiceKey, ServiceCreation},
        role::{Caller, Role, ServiceCaller},
        service_account::{
            ClientSecret, MOST_ACCOUNTS, MOST_KEYS, PresentedSecret, ServiceAccount, ServiceKey, ServiceName,
        },
        session::Client,
        token::Minted,
    },
    error::{Error, FieldReason},
};

use super::Service;

impl Service {
    /// Issues an access token to the service that has presented the secret of one of its keys.
    ///
    /// Every refusal is the same. Only refusals count against the limit of a client, since a service asks as often as it
    /// needs to.
    pub async fn issue_service_token(
        &self,
        id: Option<ServiceAccountId>,
        secret: &ClientSecret,
        client: &Client,
    ) -> Result<Minted, Error> {
        let verified = self.verify_service_secret(id, secret, client).await;
        if matches!(verified, Err(Error::InvalidClient | Error::Throttled { .. })) {
            metrics::counter!("postern_service_tokens_total", "outcome" => "refused").increment(1);
        }
        let (account, key) = verified?;
        let token = self.tokens.mint_service_access(&account, &key, &self.env)?;
        metrics::counter!("postern_service_tokens_total", "outcome" => "issued").increment(1);
        Ok(token)
    }

    /// The service that has presented the secret of one of its keys, for a call that it makes with that secret in the place of
    /// a token. A secret that was verified within the last minute costs no statement, and what has ended its tokens meanwhile
    /// has ended this too. The rules are those of [`Self::issue_service_token`].
    pub async fn authenticate_service(
        &self,
        id: Option<ServiceAccountId>,
        secret: &ClientSecret,
        client: &Client,
    ) -> Result<Caller, Error> {
        let presented = id.map(|id| PresentedSecret::of(id, secret));
        let remembered = presented.as_ref().and_then(|presented| self.verified_secrets.get(presented, self.env.now()));
        // Whatever is not sure is looked up again.
        if let Some(caller) = remembered.and_then(|service| self.revocations.check(Caller::Service(service)).ok()) {
            return Ok(caller);
        }
        let (account, key) = self.verify_service_secret(id, secret, client).await?;
        let service = ServiceCaller { account_id: account.id, key_id: key.id, token_id: None, roles: account.roles };
        if let Some(presented) = presented {
            self.verified_secrets.insert(presented, service.clone(), key.expire_time);
        }
        Ok(Caller::Service(service))
    }

    /// Ends one token of a service. The other tokens of its key stay.
    pub(super) async fn revoke_service_token(&self, service: &ServiceCaller, client: &Client) -> Result<(), Error> {
        let Some(token) = service.token_id else {
            return Ok(());
        };
        let too_many = |retry_after| Error::Throttled { retry_after };
        self.token_revocation_limiter.check_key(&service.account_id).map_err(too_many)?;
        let context = self.audit_context(Some(service.account_id.into()), client.ip)?;
        self.store.revoke_service_token(service.account_id, token, context).await?;
        self.sync_revocations().await;
        Ok(())
    }

    /// The account and the key whose secret was presented.
    async fn verify_service_secret(
        &self,
        id: Option<ServiceAccountId>,
        secret: &ClientSecret,
        client: &Client,
    ) -> Result<(ServiceAccount, ServiceKey), Error> {
        let presented = secret.hash();
        // An id that cannot be one is looked up too, so that it takes as long.
        let id = id.unwrap_or(ServiceAccountId(uuid::Uuid::nil()));
        let now = self.env.now();
        let found = self.store.service_credentials(id).await?.filter(|found| !found.account.disabled);
        let key = found.as_ref().and_then(|found| {
            let is_live = |key: &ServiceKey| key.expire_time.is_none_or(|end| now < end);
            let same = found.keys.iter().filter(|(key, hash)| hash.is_same(&presented) && is_live(key));
            same.map(|(key, _)| key.clone()).next()
        });
        let (Some(found), Some(key)) = (found, key) else {
            let too_many = |retry_after| Error::Throttled { retry_after };
            self.login_limiter.check(client.ip).map_err(too_many)?;
            return Err(Error::InvalidClient);
        };
        self.note_use(&key, now).await;
        Ok((found.account, key))
    }

    /// Writes once an hour that a key is in use. A failure is left to the next use.
    async fn note_use(&self, key: &ServiceKey, now: OffsetDateTime) {
        let hour = start_of_hour(now);
        if key.last_use_time.is_some_and(|last| last >= hour) {
            return;
        }
        if let Err(error) = self.store.service_key_used(key.id, hour).await {
            tracing::debug!(%error, "the use of a service key could not be written");
        }
    }

    /// Creates an account. It has no key yet.
    pub async fn create_service(
        &self,
        name: ServiceName,
        roles: Vec<Role>,
        by: Administrator,
    ) -> Result<ServiceAccount, Error> {
        let context = self.administrative(by)?;
        let account = ServiceAccount {
            id: ServiceAccountId(self.env.uuid()?),
            name,
            roles,
            disabled: false,
            create_time: context.now,
            update_time: context.now,
        };
        match self.store.create_service(account.clone(), MOST_ACCOUNTS, context).await? {
            ServiceCreation::Created => Ok(account),
            ServiceCreation::NameTaken => Err(Error::ServiceNameTaken),
            ServiceCreation::TooMany => Err(Error::field(
                "name",
                FieldReason::TooMany,
                format!("cannot be used: there are {MOST_ACCOUNTS} service accounts, so delete one that is not used"),
            )),
        }
    }

    /// One account.
    pub async fn service(&self, id: ServiceAccountId) -> Result<ServiceAccount, Error> {
        self.store.service(id).await?.ok_or(NO_SERVICE)
    }

    /// The account with this name.
    pub async fn service_by_name(&self, name: &str) -> Result<ServiceAccount, Error> {
        self.store.service_by_name(name).await?.ok_or(NO_SERVICE)
    }

    /// A page of all accounts, oldest first.
    pub async fn list_services(&self, size: u32, page_token: &str) -> Result<Page<ServiceAccount>, Error> {
        let after = self.id_cursor("services", page_token)?;
        let entries = self.store.list_services(after, size + 1).await?;
        self.page("services", size, entries, |account| account.id.to_string())
    }

    /// Replaces the roles of an account.
    pub async fn set_service_roles(
        &self,
        id: ServiceAccountId,
        roles: Vec<Role>,
        by: Administrator,
    ) -> Result<ServiceAccount, Error> {
        let changed = self.store.set_service_roles(id, roles, self.administrative(by)?).await?.ok_or(NO_SERVICE)?;
        self.sync_revocations().await;
        Ok(changed)
    }

    /// Disables an account, which ends its tokens.
    pub async fn disable_service(
        &self,
        id: ServiceAccountId,
        reason: Option<String>,
        by: Administrator,
    ) -> Result<ServiceAccount, Error> {
        self.set_service_disabled(id, true, reason, by).await
    }

    /// Enables an account again.
    pub async fn enable_service(&self, id: ServiceAccountId, by: Administrator) -> Result<ServiceAccount, Error> {
        self.set_service_disabled(id, false, None, by).await
    }

    async fn set_service_disabled(
        &self,
        id: ServiceAccountId,
        disabled: bool,
        reason: Option<String>,
        by: Administrator,
    ) -> Result<ServiceAccount, Error> {
        let context = self.administrative(by)?;
        let changed = self.store.set_service_disabled(id, disabled, reason, context).await?.ok_or(NO_SERVICE)?;
        self.sync_revocations().await;
        Ok(changed)
    }

    /// Deletes an account and its keys, which ends its tokens.
    pub async fn delete_service(&self, id: ServiceAccountId, by: Administrator) -> Result<(), Error> {
        if !self.store.delete_service(id, self.administrative(by)?).await? {
            return Err(NO_SERVICE);
        }
        self.sync_revocations().await;
        Ok(())
    }

    /// Creates a key. Its secret is returned, and is nowhere else afterwards.
    pub async fn create_service_key(
        &self,
        account: ServiceAccountId,
        description: String,
        expire_time: Option<OffsetDateTime>,
        by: Administrator,
    ) -> Result<(ServiceKey, ClientSecret), Error> {
        let context = self.administrative(by)?;
        if expire_time.is_some_and(|end| end <= context.now) {
            return Err(Error::field("expire_time", FieldReason::OutOfRange, "must be in the future"));
        }
        let secret = ClientSecret::generate(&self.env)?;
        let key = ServiceKey {
            id: ServiceKeyId(self.env.uuid()?),
            account,
            description,
            create_time: context.now,
            expire_time,
            last_use_time: None,
        };
        let new = NewServiceKey { key: key.clone(), secret: secret.hash(), most: MOST_KEYS, context };
        match self.store.create_service_key(new).await? {
            KeyCreation::Created => Ok((key, secret)),
            KeyCreation::NoSuchAccount => Err(NO_SERVICE),
            KeyCreation::TooMany => Err(Error::field(
                "service_account_id",
                FieldReason::TooMany,
                format!("has {MOST_KEYS} keys, as many as it may have: delete one that is not used"),
            )),
        }
    }

    /// The keys of an account, oldest first.
    pub async fn list_service_keys(&self, account: ServiceAccountId) -> Result<Vec<ServiceKey>, Error> {
        self.service(account).await?;
        Ok(self.store.list_service_keys(account).await?)
    }

    /// Deletes a key, which ends the tokens that it got.
    pub async fn delete_service_key(
        &self,
        account: ServiceAccountId,
        key: ServiceKeyId,
        by: Administrator,
    ) -> Result<(), Error> {
        if !self.store.delete_service_key(account, key, self.administrative(by)?).await? {
            return Err(Error::NotFound("key of this service account"));
        }
        self.sync_revocations().await;
        Ok(())
    }
}

const NO_SERVICE: Error = Error::NotFound("service account");

fn start_of_hour(time: OffsetDateTime) -> OffsetDateTime {
    let past = i64::from(time.minute()) * 60 + i64::from(time.second());
    time.replace_nanosecond(0).unwrap_or(time) - past.seconds()
}
