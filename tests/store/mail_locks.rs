//! The races of `mail_races.rs` that PostgreSQL decides by a lock. A test holds the lock while the step runs, so that a
//! missing lock fails the test every time.

use std::sync::Arc;

use postern::domain::{
    account::User,
    mail::MailKind,
    one_time::{OneTimeGrant, Purpose},
    ports::{
        EmailChangeRequest, EmailConfirmationOutcome, MailClaim, MailRetry, PasswordResetOutcome, SessionOpening, Store,
    },
};
use time::ext::NumericalDuration as _;

use crate::{
    fixtures::{
        NOW, address, audit_context, claim, claimed, confirmation_by, consume_token, email_change, log_in, mail,
        mail_with_token, new_session, password_change, queue_mail, reset_by, sign_up, sign_up_without_mail, token,
        verification,
    },
    parallel::{assert_waits, begin},
    support::{Database, Engine, with_database},
};

/// Declares a test on PostgreSQL for each `async fn name(database: &Database)`.
macro_rules! on_postgres {
    ($($test:ident),+ $(,)?) => {
        mod postgres {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                super::with_database(super::Engine::Postgres, super::$test).await;
            })+
        }
    };
}

on_postgres![
    a_claim_skips_a_mail_that_another_claim_has_locked,
    a_claim_waits_for_a_step_that_voids_the_users_tokens,
    a_claim_that_lapsed_while_it_waited_claims_nothing,
    a_token_that_a_concurrent_step_consumes_is_dead,
    every_step_waits_for_an_uncommitted_change_of_its_account,
    a_reset_ends_an_uncommitted_session_and_voids_an_uncommitted_token,
    an_address_that_is_taken_between_check_and_update_keeps_the_token_live,
    a_purge_skips_locked_rows,
];

async fn a_claim_skips_a_mail_that_another_claim_has_locked(database: &Database) {
    let store = database.store().await;
    sign_up(store.as_ref(), "ada").await;
    sign_up(store.as_ref(), "grace").await;
    let oldest = "SELECT id FROM mail_outbox ORDER BY next_attempt_time LIMIT 1 FOR UPDATE";
    let transaction = begin(database, oldest.to_owned()).await;
    assert_eq!(claimed(store.as_ref()).await.recipient, address("grace@example.com"));
    assert_eq!(claim(store.as_ref()).await, MailClaim::NoneDue);
    transaction.rollback().await.expect("a rollback");
    assert_eq!(claimed(store.as_ref()).await.recipient, address("ada@example.com"));
}

async fn a_claim_waits_for_a_step_that_voids_the_users_tokens(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let id = database.id(user.id.0);
    for user_id in [Some(user.id), None] {
        queue_mail(store.as_ref(), &mail(MailKind::ResetPassword, "ada@example.com", user_id)).await;
        let mut transaction = begin(database, format!("SELECT id FROM users WHERE id = {id} FOR NO KEY UPDATE")).await;
        let claiming = tokio::spawn({
            let store = Arc::clone(&store);
            async move { claim(store.as_ref()).await }
        });
        assert_waits(database, &claiming).await;
        sqlx::raw_sql("DELETE FROM mail_outbox")
            .execute(&mut *transaction)
            .await
            .expect("the claim has not locked the mail");
        transaction.commit().await.expect("a commit");
        assert_eq!(claiming.await.expect("the task did not panic"), MailClaim::Dropped(MailKind::ResetPassword));
        assert_eq!(database.tokens().await, Vec::<String>::new());
    }
}

async fn a_claim_that_lapsed_while_it_waited_claims_nothing(database: &Database) {
    let store = database.store().await;
    let user = sign_up(store.as_ref(), "ada").await;
    let id = database.id(user.id.0);
    let transaction = begin(database, format!("SELECT id FROM users WHERE id = {id} FOR NO KEY UPDATE")).await;
    let claiming = tokio::spawn({
        let store = Arc::clone(&store);
        async move { claim(store.as_ref()).await }
    });
    assert_waits(database, &claiming).await;
    database.sql.execute("UPDATE mail_outbox SET attempts = attempts + 1").await;
    transaction.commit().await.expect("a commit");
    let claim = claiming.await.expect("the task did not panic");
    assert!(!matches!(claim, MailClaim::Claimed(_)), "{claim:?}");
    assert_eq!(database.outbox().await.len(), 1, "the mail is left for the newer claim");
    assert_eq!(database.tokens().await, Vec::<String>::new());
}

async fn a_token_that_a_concurrent_step_consumes_is_dead(database: &Database) {
    let store = database.store().await;
    for (name, purpose) in ["ada", "grace", "linus"].into_iter().zip(Purpose::ALL) {
        let user = sign_up_without_mail(database, store.as_ref(), name).await;
        let token = token(store.as_ref(), &user, purpose).await;
        let id = database.id(token.id.0);
        let transaction = begin(database, format!("DELETE FROM one_time_tokens WHERE id = {id}")).await;
        let consuming = tokio::spawn({
            let store = Arc::clone(&store);
            async move { consume_token(store.as_ref(), token, NOW).await }
        });
        assert_waits(database, &consuming).await;
        transaction.commit().await.expect("a commit");
        assert!(!consuming.await.expect("the task did not panic"), "{purpose:?}");
    }
}

/// The steps that are refused once an account has changed.
#[derive(Debug, Clone, Copy)]
enum Step {
    Verify,
    Reset,
    Confirm,
    ChangePassword,
    RequestEmailChange,
}

async fn is_refused(store: Arc<dyn Store>, step: Step, user: User, tokens: [OneTimeGrant; 3]) -> bool {
    let [verify, reset, change] = tokens;
    match step {
        Step::Verify => store.verify_email(verification(verify, audit_context())).await.expect("the store").is_none(),
        Step::Reset => {
            let outcome = store.reset_password(reset_by(reset)).await.expect("the store");
            outcome == PasswordResetOutcome::TokenDead
        }
        Step::Confirm => {
            let outcome = store.confirm_email_change(confirmation_by(change)).await.expect("the store");
            outcome == EmailConfirmationOutcome::TokenDead
        }
        Step::ChangePassword => {
            let opening = store.change_password(password_change(&user)).await.expect("the store");
            opening == SessionOpening::Refused
        }
        Step::RequestEmailChange => {
            let change = email_change(&user, "newer@example.com");
            store.request_email_change(change).await.expect("the store") == EmailChangeRequest::Refused
        }
    }
}

async fn every_step_waits_for_an_uncommitted_change_of_its_account(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let id = database.id(user.id.0);
    let tokens = [
        token(store.as_ref(), &user, Purpose::VerifyEmail).await,
        token(store.as_ref(), &user, Purpose::ResetPassword).await,
        token(store.as_ref(), &user, Purpose::ChangeEmail).await,
    ];
    let before = database.everything().await;
    let [disabled, password, address] = ["disabled = true", "password_version = 1", "email = 'lovelace@example.com'"];
    for (step, change) in [
        (Step::Verify, address),
        (Step::Reset, address),
        (Step::Reset, disabled),
        (Step::Confirm, disabled),
        (Step::ChangePassword, password),
        (Step::ChangePassword, disabled),
        (Step::RequestEmailChange, password),
        (Step::RequestEmailChange, disabled),
    ] {
        let transaction = begin(database, format!("UPDATE users SET {change} WHERE id = {id}")).await;
        let refused = tokio::spawn(is_refused(Arc::clone(&store), step, user.clone(), tokens.clone()));
        assert_waits(database, &refused).await;
        transaction.commit().await.expect("a commit");
        assert!(refused.await.expect("the task did not panic"), "{step:?} after {change}");
        database.set_user(user.id, "disabled = false, password_version = 0, email = 'ada@example.com'").await;
        assert_eq!(database.everything().await, before, "{step:?} after {change}");
    }
}

async fn a_reset_ends_an_uncommitted_session_and_voids_an_uncommitted_token(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    log_in(store.as_ref(), &user).await;
    let token = token(store.as_ref(), &user, Purpose::ResetPassword).await;
    let (user_id, session) = (database.id(user.id.0), database.id(new_session(user.id).grant.session_id.0));
    let claimed_token = database.id(mail_with_token(&user, Purpose::VerifyEmail).id.0);
    // The statements of `open_session` and `claim_mail`, not committed yet.
    let transaction = begin(
        database,
        format!(
            "SELECT u.id FROM users u WHERE u.id = {user_id} FOR SHARE; \
             INSERT INTO sessions (id, user_id, create_time, end_time, generation, refresh_hash, \
             refresh_issue_time, refresh_expire_time, last_refresh_time) \
             SELECT {session}, user_id, create_time, end_time, 0, refresh_hash, refresh_issue_time, \
             refresh_expire_time, last_refresh_time FROM sessions; \
             INSERT INTO one_time_tokens (id, user_id, purpose, email, create_time, expire_time) \
             SELECT {claimed_token}, user_id, 'verify_email', email, create_time, expire_time FROM one_time_tokens"
        ),
    )
    .await;
    let resetting = tokio::spawn({
        let store = Arc::clone(&store);
        async move { store.reset_password(reset_by(token)).await.expect("the store") }
    });
    assert_waits(database, &resetting).await;
    transaction.commit().await.expect("a commit");
    assert_eq!(resetting.await.expect("the task did not panic"), PasswordResetOutcome::Reset);
    assert_eq!(database.sessions_where("revoke_reason = 'password_reset'").await, 2);
    assert_eq!(database.tokens().await, Vec::<String>::new());
}

async fn an_address_that_is_taken_between_check_and_update_keeps_the_token_live(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let other = sign_up_without_mail(database, store.as_ref(), "grace").await;
    let token = token(store.as_ref(), &user, Purpose::ChangeEmail).await;
    for commits in [true, false] {
        let id = database.id(other.id.0);
        let take_address = format!("UPDATE users SET email = '{}' WHERE id = {id}", token.email.as_str());
        let transaction = begin(database, take_address).await;
        let confirming = tokio::spawn({
            let (store, confirmation) = (Arc::clone(&store), confirmation_by(token.clone()));
            async move { store.confirm_email_change(confirmation).await.expect("the store") }
        });
        assert_waits(database, &confirming).await;
        if commits {
            transaction.commit().await.expect("a commit");
            assert_eq!(confirming.await.expect("the task did not panic"), EmailConfirmationOutcome::EmailTaken);
            assert!(store.one_time_token(token.id).await.expect("the store").is_some());
            database.set_user(other.id, "email = 'grace@example.com'").await;
        } else {
            transaction.rollback().await.expect("a rollback");
            let outcome = confirming.await.expect("the task did not panic");
            assert!(matches!(outcome, EmailConfirmationOutcome::Changed(_)), "{outcome:?}");
        }
    }
}

/// A purge locks many rows in no order. If it waited for one while it holds others, it could deadlock.
async fn a_purge_skips_locked_rows(database: &Database) {
    let store = database.store().await;
    for name in ["ada", "grace"] {
        let user = sign_up_without_mail(database, store.as_ref(), name).await;
        token(store.as_ref(), &user, Purpose::VerifyEmail).await;
        queue_mail(store.as_ref(), &mail(MailKind::AccountExists, user.email.as_str(), None)).await;
        let mail = claimed(store.as_ref()).await;
        assert!(store.mail_failed(mail.id, mail.attempt, MailRetry::Never, NOW).await.expect("the store"));
    }
    let rows_of_ada = "email = 'ada@example.com' FOR UPDATE";
    let transaction = begin(
        database,
        format!(
            "SELECT id FROM one_time_tokens WHERE {rows_of_ada}; SELECT email FROM mail_limits WHERE {rows_of_ada}; \
             SELECT id FROM mail_outbox WHERE recipient = 'ada@example.com' FOR UPDATE"
        ),
    )
    .await;
    let purge = async || {
        store.purge_mail(NOW + 365.days(), NOW + 365.days(), 1_000).await.expect("the store");
        let limits = database.sql.number("SELECT count(*) FROM mail_limits").await;
        (database.tokens().await.len(), database.outbox().await.len(), limits)
    };
    assert_eq!(purge().await, (1, 1, 1), "locked rows are left for the next purge");
    transaction.rollback().await.expect("a rollback");
    assert_eq!(purge().await, (0, 0, 0));
}
