//! A step and its audit row are written together or not at all. Here a step fails because the id of its audit row is
//! already used.

use postern::{
    domain::{
        account::User,
        audit::AuditContext,
        one_time::Purpose,
        ports::{
            EmailChange, EmailConfirmation, Logout, NewAccount, NewSession, PasswordChange, PasswordReset, Rehash,
            Rotation, Store, UserDeletion, UsernameChange,
        },
    },
    error::StoreError,
};

use crate::{
    attempts::attempt,
    fixtures::{
        NEW_HASH, OLD_HASH, audit_context, confirmation_by, deletion, email_change, log_in, new_account, new_session,
        password_change, refresh, reset_by, roles, sign_up_admin, sign_up_without_mail, subject, token,
        username_change, verification,
    },
    support::{Database, on_each_engine},
};

on_each_engine![
    an_account_step_without_its_audit_row_changes_nothing,
    a_session_step_without_its_audit_row_changes_nothing,
    an_administrative_step_without_its_audit_row_changes_nothing,
];

/// An audit context whose row exists already.
async fn recorded_context(store: &dyn Store) -> AuditContext {
    let context = audit_context();
    store.attempt_failed(attempt(subject("ada@example.com")), None, context).await.expect("the store");
    context
}

async fn assert_fails_unchanged<T: std::fmt::Debug>(
    database: &Database,
    what: &str,
    step: impl Future<Output = Result<T, StoreError>>,
) {
    let before = database.everything().await;
    let failure = step.await.expect_err(what);
    assert!(matches!(failure, StoreError::Broken(_)), "{what}: {failure:?}");
    assert_eq!(database.everything().await, before, "{what}");
}

/// An account with one session and one password attempt.
async fn account(database: &Database, store: &dyn Store) -> User {
    let user = sign_up_without_mail(database, store, "ada").await;
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

async fn an_account_step_without_its_audit_row_changes_nothing(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let context = recorded_context(store).await;
    let user = account(database, store).await;
    let verify = token(store, &user, Purpose::VerifyEmail).await;
    let reset = token(store, &user, Purpose::ResetPassword).await;
    let change = token(store, &user, Purpose::ChangeEmail).await;

    let account = NewAccount { context, ..new_account("grace") };
    assert_fails_unchanged(database, "a sign-up", store.create_account(account)).await;
    assert_fails_unchanged(database, "a verification", store.verify_email(verification(verify, context))).await;
    let reset = PasswordReset { context, ..reset_by(reset) };
    assert_fails_unchanged(database, "a reset", store.reset_password(reset)).await;
    let change_by_password = password_change(&user);
    let session = NewSession { context, ..change_by_password.session.clone() };
    let change_by_password = PasswordChange { session, ..change_by_password };
    assert_fails_unchanged(database, "a change of the password", store.change_password(change_by_password)).await;
    let request = EmailChange { context, ..email_change(&user, "new@example.com") };
    assert_fails_unchanged(database, "a request for a change of the address", store.request_email_change(request))
        .await;
    let named = UsernameChange { context, ..username_change(&user, "lovelace") };
    assert_fails_unchanged(database, "a change of the username", store.change_username(named)).await;
    let confirmation = EmailConfirmation { context, ..confirmation_by(change.clone()) };
    assert_fails_unchanged(database, "a change of the address", store.confirm_email_change(confirmation)).await;
    let holder = sign_up_without_mail(database, store, "new-ada").await;
    assert_eq!(holder.email, change.email);
    let confirmation = EmailConfirmation { eviction: context, ..confirmation_by(change) };
    assert_fails_unchanged(database, "a deletion of the holder", store.confirm_email_change(confirmation)).await;
}

async fn a_session_step_without_its_audit_row_changes_nothing(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let context = recorded_context(store).await;
    let user = account(database, store).await;
    let consumed = log_in(store, &user).await;
    let newer = refresh(store, &consumed).await;
    let current = refresh(store, &newer).await;

    let hash = |phc: &str| postern::domain::password::PasswordHash::from_phc(phc.to_owned());
    let rehash = Some(Rehash { from: hash(OLD_HASH), to: hash(NEW_HASH) });
    let failing = attempt(subject(user.email.as_str()));
    let attempt = Some(failing.subject);
    let session = NewSession { context, rehash, attempt, ..new_session(user.id) };
    assert_fails_unchanged(database, "a login", store.open_session(session)).await;
    assert_fails_unchanged(database, "a login that failed", store.attempt_failed(failing, Some(user.id), context))
        .await;
    let reuse = Rotation { context, ..consumed.rotation() };
    assert_fails_unchanged(database, "a reuse", store.rotate_refresh(reuse)).await;
    assert_fails_unchanged(database, "a logout", store.logout(Logout { context, ..current.logout() })).await;
    let everywhere = Logout { context, ..current.logout_everywhere() };
    assert_fails_unchanged(database, "a logout everywhere", store.logout(everywhere)).await;
    let session = current.grant.session_id;
    assert_fails_unchanged(database, "a revocation", store.revoke_session(session, user.id, context)).await;
}

async fn an_administrative_step_without_its_audit_row_changes_nothing(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let context: AuditContext = recorded_context(store).await;
    let user = account(database, store).await;
    token(store, &user, Purpose::ResetPassword).await;
    let disabled = sign_up_admin(database, store, "grace").await;
    sign_up_admin(database, store, "linus").await;
    store.disable_user(disabled.id, None, audit_context()).await.expect("the store");

    let changed = roles(&["admin", "user"]);
    assert_fails_unchanged(database, "a change of roles", store.set_roles(user.id, changed, context)).await;
    assert_fails_unchanged(database, "disabling", store.disable_user(user.id, None, context)).await;
    assert_fails_unchanged(database, "enabling", store.enable_user(disabled.id, context)).await;
    assert_fails_unchanged(database, "ending all sessions", store.revoke_user_sessions(user.id, context)).await;
    let deletion = UserDeletion { context, ..deletion(&user) };
    assert_fails_unchanged(database, "a deletion", store.delete_user(deletion)).await;
}
