//! A row of the audit is there exactly if its step is: a step whose row cannot be written leaves nothing behind. What
//! makes it fail here is that the row's id is taken.

use postern::{
    domain::{
        account::User,
        audit::AuditContext,
        one_time::Purpose,
        ports::{
            EmailChange, EmailConfirmation, Logout, NewAccount, NewSession, PasswordChange, PasswordReset, Rehash,
            Rotation, Store, UserDeletion,
        },
    },
    error::StoreError,
};

use crate::{
    fixtures::{
        NEW_HASH, OLD_HASH, audit_context, confirmation_by, deletion, email_change, log_in, new_account, new_session,
        password_change, refresh, reset_by, roles, sign_up_admin, sign_up_quietly, subject, token,
    },
    support::{Database, on_each_engine},
};

on_each_engine![
    an_account_whose_step_cannot_be_told_is_unchanged,
    a_session_whose_step_cannot_be_told_is_unchanged,
    an_administrative_step_that_cannot_be_told_is_not_made,
];

/// Circumstances whose row is there already.
async fn told_before(store: &dyn Store) -> AuditContext {
    let of = audit_context();
    store.login_failed(None, of).await.expect("the store");
    of
}

async fn assert_not_made<T: std::fmt::Debug>(
    database: &Database,
    what: &str,
    step: impl Future<Output = Result<T, StoreError>>,
) {
    let before = database.everything().await;
    let failure = step.await.expect_err(what);
    assert!(matches!(failure, StoreError::Broken(_)), "{what}: {failure:?}");
    assert_eq!(database.everything().await, before, "{what}");
}

/// An account with a live token for each purpose, one session and a wrong guess.
async fn account(database: &Database, store: &dyn Store) -> User {
    let user = sign_up_quietly(database, store, "ada").await;
    log_in(store, &user).await;
    let policy = crate::attempts::POLICY;
    let attempt = postern::domain::ports::LoginAttempt {
        subject: subject(user.email.as_str()),
        policy,
        now: crate::fixtures::NOW,
    };
    store.reserve_attempt(attempt).await.expect("the store");
    user
}

async fn an_account_whose_step_cannot_be_told_is_unchanged(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let of = told_before(store).await;
    let user = account(database, store).await;
    let verify = token(store, &user, Purpose::VerifyEmail).await;
    let reset = token(store, &user, Purpose::ResetPassword).await;
    let change = token(store, &user, Purpose::ChangeEmail).await;

    let account = NewAccount { context: of, ..new_account("grace") };
    assert_not_made(database, "a sign-up", store.create_account(account)).await;
    assert_not_made(database, "a verification", store.verify_email(verify, of)).await;
    let reset = PasswordReset { context: of, ..reset_by(reset) };
    assert_not_made(database, "a reset", store.reset_password(reset)).await;
    let by_password = password_change(&user);
    let session = NewSession { context: of, ..by_password.session.clone() };
    let by_password = PasswordChange { session, ..by_password };
    assert_not_made(database, "a change of the password", store.change_password(by_password)).await;
    let asked = EmailChange { context: of, ..email_change(&user, "new@example.com") };
    assert_not_made(database, "a change of the address, asked for", store.request_email_change(asked)).await;
    let confirmed = EmailConfirmation { context: of, ..confirmation_by(change) };
    assert_not_made(database, "a change of the address", store.confirm_email_change(confirmed)).await;
}

async fn a_session_whose_step_cannot_be_told_is_unchanged(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let of = told_before(store).await;
    let user = account(database, store).await;
    let spent = log_in(store, &user).await;
    let newer = refresh(store, &spent).await;
    let live = refresh(store, &newer).await;

    let hash = |phc: &str| postern::domain::password::PasswordHash::from_phc(phc.to_owned());
    let rehash = Some(Rehash { from: hash(OLD_HASH), to: hash(NEW_HASH) });
    let attempt = Some(subject(user.email.as_str()));
    let session = NewSession { context: of, rehash, attempt, ..new_session(user.id) };
    assert_not_made(database, "a login", store.open_session(session)).await;
    assert_not_made(database, "a login that failed", store.login_failed(Some(user.id), of)).await;
    let reuse = Rotation { context: of, ..spent.rotation() };
    assert_not_made(database, "a reuse", store.rotate_refresh(reuse)).await;
    assert_not_made(database, "a logout", store.logout(Logout { context: of, ..live.logout() })).await;
    let everywhere = Logout { context: of, ..live.logout_everywhere() };
    assert_not_made(database, "a logout everywhere", store.logout(everywhere)).await;
    let session = live.grant.session_id;
    assert_not_made(database, "a revocation", store.revoke_session(session, user.id, of)).await;
}

async fn an_administrative_step_that_cannot_be_told_is_not_made(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let of: AuditContext = told_before(store).await;
    let user = account(database, store).await;
    token(store, &user, Purpose::ResetPassword).await;
    let disabled = sign_up_admin(database, store, "grace").await;
    sign_up_admin(database, store, "linus").await;
    store.disable_user(disabled.id, None, audit_context()).await.expect("the store");

    let changed = roles(&["admin", "user"]);
    assert_not_made(database, "a change of roles", store.set_roles(user.id, changed, of)).await;
    assert_not_made(database, "disabling", store.disable_user(user.id, None, of)).await;
    assert_not_made(database, "enabling", store.enable_user(disabled.id, of)).await;
    assert_not_made(database, "ending all sessions", store.revoke_user_sessions(user.id, of)).await;
    let deletion = UserDeletion { context: of, ..deletion(&user) };
    assert_not_made(database, "a deletion", store.delete_user(deletion)).await;
}
