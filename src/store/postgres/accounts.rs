//! Signing up, in PostgreSQL's dialect.

use crate::{
    domain::{
        audit::Action,
        ports::{AccountCreation, NewAccount},
        role::Role,
    },
    error::StoreError,
    store::{
        rows::UserRow,
        statement::Statement,
        steps::{self, bind_mail},
    },
};

use super::PostgresStore;

/// Creates an account with a role, its mail and its audit row; no row if its address or its username is taken.
///
/// `$1` to `$7` are the values of [`bind_mail`]: the mail. `$8` username, `$9` password hash, `$10` role; `$11` and
/// `$12` the interval and the tolerance of the limit of the address, in seconds; `$13` the time of the step, `$14` to
/// `$17` the rest of the audit row, `$18` id and `$19` address of the account, `$20` how
/// far ahead the count of the address can be, in seconds. It waits for a sign-up with the same
/// address or username that has not been committed yet.
const SIGN_UP: &str = "WITH account AS (\
     INSERT INTO users (id, username, email, password_hash, create_time, update_time) \
     VALUES ($18, $8, $19, $9, $13, $13) ON CONFLICT DO NOTHING RETURNING *), \
     role AS (INSERT INTO user_roles (user_id, role) SELECT id, $10 FROM account), \
     counted AS (INSERT INTO mail_limits AS m (email, spent_until) \
     SELECT $3, $6 + make_interval(secs => $11) FROM account \
     ON CONFLICT (email) DO UPDATE SET spent_until = make_interval(secs => $11) + \
     CASE WHEN m.spent_until > $6 + make_interval(secs => $20) THEN $6 ELSE greatest(m.spent_until, $6) END \
     WHERE m.spent_until <= $6 + make_interval(secs => $12) OR m.spent_until > $6 + make_interval(secs => $20) \
     RETURNING 1), \
     queued AS (INSERT INTO mail_outbox (id, kind, recipient, user_id, new_email, create_time, trace_parent, next_attempt_time) \
     SELECT $1, $2, $3, $4, $5, $6, $7, clock_timestamp() FROM counted), \
     audited AS (INSERT INTO audit_events (id, create_time, action, actor_id, user_id, client_ip) \
     SELECT $14, $13, $15, $16, id, $17 FROM account) \
     SELECT id, username, email, email_verified, disabled, create_time, update_time, $10 AS roles FROM account";

impl PostgresStore {
    /// Creates an account in one statement. Where something is in its way, a transaction finds out what.
    pub(super) async fn sign_up(&self, account: NewAccount) -> Result<AccountCreation, StoreError> {
        if account.withholds_mail || account.roles.is_some() {
            return steps::write(self, |tx| steps::create_account(tx, account)).await;
        }
        let statement = bind_mail(Statement::new(SIGN_UP), &account.verification)
            .bind(account.username.as_str())
            .bind(account.password_hash.as_str())
            .bind(Role::user().as_str())
            .bind(account.limit.interval.as_secs_f64())
            .bind(account.limit.tolerance().as_secs_f64())
            .bind(account.context.now)
            .bind(account.context.event.0)
            .bind(Action::SignUp.as_str())
            .bind(account.context.actor.map(|actor| actor.0))
            .bind(account.context.client_ip.map(|ip| ip.to_string()))
            .bind(account.id.0)
            .bind(account.email.as_str())
            .bind(account.limit.furthest().as_secs_f64());
        match self.written::<UserRow>(statement).await? {
            Some(user) => {
                self.mail_queued.notify_one();
                Ok(AccountCreation::Created(user.into_user()?))
            }
            None => steps::write(self, |tx| steps::create_account(tx, account)).await,
        }
    }
}
