//! The steps of signing keys.
//!
//! Replicas decide about the keys at the same time and from what each has read. A change therefore names the keys that it
//! was decided from, and does nothing if they are others by now.

use async_trait::async_trait;

use crate::{
    domain::{
        audit::{AuditContext, AuditTarget},
        ports::{KeyChange, KeyEdit, KeyStore, SealedSigningKey},
        signing_key::revocation_id,
    },
    error::StoreError,
    store::{rows::SigningKeyRow, statement::Statement},
};

use super::transaction::{Backend, WriteTransaction, write};

#[async_trait]
impl<B: Backend> KeyStore for B {
    async fn signing_keys(&self) -> Result<Vec<SealedSigningKey>, StoreError> {
        let query = Statement::new(
            "SELECT kid, algorithm, sealed_private_key, create_time, sign_time, publish_ahead_seconds FROM signing_keys",
        );
        Ok(self.rows::<SigningKeyRow>(query).await?.into_iter().map(SigningKeyRow::into_key).collect())
    }

    async fn change_signing_keys(&self, change: KeyChange) -> Result<bool, StoreError> {
        write(self, move |tx| change_keys(tx, change)).await
    }
}

async fn change_keys(mut tx: impl WriteTransaction, change: KeyChange) -> Result<bool, StoreError> {
    // Locks the keys. They are read after the locks are held: a step that had them may have changed them.
    tx.run(Statement::new("UPDATE signing_keys SET algorithm = algorithm")).await?;
    let count = tx.number(Statement::new("SELECT count(*) FROM signing_keys")).await?;
    if usize::try_from(count) != Ok(change.expected.len()) {
        return Ok(false);
    }
    for key in change.expected {
        if !tx.finds(exactly(key)).await? {
            return Ok(false);
        }
    }
    for edit in change.edits {
        apply(&mut tx, edit, &change.context).await?;
    }
    if let Some((action, detail)) = change.event {
        tx.record(action, &change.context, AuditTarget::default().detail(detail)).await?;
    }
    tx.commit().await?;
    Ok(true)
}

async fn apply(tx: &mut impl WriteTransaction, edit: KeyEdit, context: &AuditContext) -> Result<(), StoreError> {
    let forget = |kid: &str| Statement::new("DELETE FROM signing_keys WHERE kid = $1").bind(kid);
    match edit {
        KeyEdit::Add(key) => {
            let sql = "INSERT INTO signing_keys \
                 (kid, algorithm, sealed_private_key, create_time, sign_time, publish_ahead_seconds) \
                 VALUES ($1, $2, $3, $4, $5, $6)";
            tx.run(bind(sql, key)).await
        }
        KeyEdit::Schedule { kid, sign_time } => {
            let sql = "UPDATE signing_keys SET sign_time = $2 WHERE kid = $1";
            tx.run(Statement::new(sql).bind(kid.as_str()).bind(sign_time)).await
        }
        KeyEdit::Reseal { kid, sealed_private_key } => {
            let sql = "UPDATE signing_keys SET sealed_private_key = $2 WHERE kid = $1";
            tx.run(Statement::new(sql).bind(kid.as_str()).bind(sealed_private_key)).await
        }
        KeyEdit::Forget { kid } => tx.run(forget(&kid)).await,
        KeyEdit::Revoke { kid } => {
            tx.run(forget(&kid)).await?;
            // To a reader of the log it is a session that no token names, unless it knows the key.
            tx.log_session(revocation_id(&kid), context).await
        }
    }
}

/// Finds a key that is exactly this one.
fn exactly(key: SealedSigningKey) -> Statement {
    let sql = "SELECT kid FROM signing_keys WHERE kid = $1 AND algorithm = $2 AND sealed_private_key = $3 \
         AND create_time = $4 AND sign_time IS NOT DISTINCT FROM $5 AND publish_ahead_seconds IS NOT DISTINCT FROM $6";
    bind(sql, key)
}

/// Stores a signing key, if there is none yet.
pub(in crate::store) fn first_signing_key(key: SealedSigningKey) -> Statement {
    let sql = "INSERT INTO signing_keys \
         (kid, algorithm, sealed_private_key, create_time, sign_time, publish_ahead_seconds) \
         SELECT $1, $2, $3, $4, $5, $6 WHERE NOT EXISTS (SELECT 1 FROM signing_keys)";
    bind(sql, key)
}

fn bind(sql: &'static str, key: SealedSigningKey) -> Statement {
    Statement::new(sql)
        .bind(key.kid.as_str())
        .bind(key.algorithm.as_str())
        .bind(key.sealed_private_key)
        .bind(key.create_time)
        .bind(key.sign_time)
        .bind(key.publish_ahead.map(|ahead| i64::try_from(ahead.as_secs()).unwrap_or(i64::MAX)))
}
