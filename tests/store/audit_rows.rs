//! The audit row of each step: one row, or none where the step changed nothing.

use postern::domain::{
    account::User,
    audit::{Action, AuditContext, AuditEvent},
    ids::{AuditEventId, SessionId, UserId},
    one_time::Purpose,
    ports::{
        EmailChange, EmailConfirmation, Logout, NewAccount, NewSession, PasswordChange, PasswordReset, Rotation, Store,
        UserDeletion, UsernameChange,
    },
    throttle::AddressLimit,
};

use crate::{
    attempts::attempt,
    fixtures::{
        LIMIT, Token, audit, audit_context, audit_context_by, confirmation_by, deletion, email_change, log_in, log_out,
        mail, new_account, new_id, new_session, password_change, queue_mail, refresh, reset_by, roles, sign_up_admin,
        sign_up_without_mail, subject, token, username_change, verification,
    },
    support::{Database, on_each_engine},
};

on_each_engine![
    each_account_step_writes_one_audit_row,
    each_session_step_writes_one_audit_row,
    each_administrative_step_writes_one_audit_row,
    session_steps_that_change_nothing_write_no_audit_row,
    account_steps_that_change_nothing_write_no_audit_row,
    administrative_steps_that_change_nothing_write_no_audit_row,
    audit_rows_remain_after_deletion_and_contain_no_address,
];

/// Runs a step and returns the one audit row that it wrote.
async fn audit_event_of<T>(store: &dyn Store, step: impl Future<Output = T>) -> AuditEvent {
    let before = audit(store).await;
    step.await;
    let mut new: Vec<_> = audit(store).await.into_iter().filter(|event| !before.contains(event)).collect();
    let event = new.pop().expect("a row");
    assert_eq!(new, [], "more rows than {event:?}");
    event
}

/// The expected audit row of a step.
fn event(context: &AuditContext, action: Action, actor: Option<UserId>, user: UserId) -> AuditEvent {
    AuditEvent {
        id: context.event,
        create_time: context.now,
        action: action.as_str().to_owned(),
        actor: actor.map(Into::into),
        user: Some(user),
        session: None,
        client_ip: Some("2001:db8::7".to_owned()),
        detail: None,
    }
}

fn with_session(event: AuditEvent, session: SessionId) -> AuditEvent {
    AuditEvent { session: Some(session), ..event }
}

fn with_detail(event: AuditEvent, detail: &str) -> AuditEvent {
    AuditEvent { detail: Some(detail.to_owned()), ..event }
}

async fn each_account_step_writes_one_audit_row(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    // The actor of a sign-up comes from the caller: its owner is anonymous, an operator is not.
    let context = audit_context_by(None);
    let account = NewAccount { context, ..new_account("ada") };
    let id = account.id;
    assert_eq!(audit_event_of(store, store.create_account(account)).await, event(&context, Action::SignUp, None, id));
    // The actor of a verification, reset or confirmation is the user of the token.
    let own = |context: &AuditContext, action| event(context, action, Some(id), id);

    let user = store.user(id).await.expect("the store").expect("an account");
    let (verify, context) = (token(store, &user, Purpose::VerifyEmail).await, audit_context_by(None));
    assert_eq!(
        audit_event_of(store, store.verify_email(verification(verify, context))).await,
        own(&context, Action::EmailVerified)
    );

    let context = audit_context_by(Some(id));
    let named = UsernameChange { context, ..username_change(&user, "lovelace") };
    assert_eq!(audit_event_of(store, store.change_username(named)).await, own(&context, Action::UsernameChanged));

    let context = audit_context_by(Some(id));
    let request = EmailChange { context, ..email_change(&user, "new@example.com") };
    assert_eq!(
        audit_event_of(store, store.request_email_change(request)).await,
        own(&context, Action::EmailChangeRequested)
    );

    let context = audit_context_by(None);
    let confirmation = confirmation_by(token(store, &user, Purpose::ChangeEmail).await);
    let confirmation = EmailConfirmation { context, ..confirmation };
    assert_eq!(
        audit_event_of(store, store.confirm_email_change(confirmation)).await,
        own(&context, Action::EmailChanged)
    );

    let context = audit_context_by(Some(id));
    let change = password_change(&user);
    let change = PasswordChange { session: NewSession { context, ..change.session.clone() }, ..change };
    let expected = with_session(own(&context, Action::PasswordChanged), change.session.grant.session_id);
    assert_eq!(audit_event_of(store, store.change_password(change)).await, expected);

    let user = store.user(id).await.expect("the store").expect("an account");
    let context = audit_context_by(None);
    let reset = reset_by(token(store, &user, Purpose::ResetPassword).await);
    let reset = PasswordReset { context, ..reset };
    assert_eq!(audit_event_of(store, store.reset_password(reset)).await, own(&context, Action::PasswordReset));

    let context = audit_context_by(Some(id));
    let deletion = UserDeletion { context, password_version: Some(2), ..deletion(&user) };
    assert_eq!(audit_event_of(store, store.delete_user(deletion)).await, own(&context, Action::UserDeleted));
}

async fn each_session_step_writes_one_audit_row(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let user = sign_up_without_mail(database, store, "ada").await;
    let own = |context: &AuditContext, action| event(context, action, Some(user.id), user.id);

    let context = audit_context_by(None);
    let session = NewSession { context, ..new_session(user.id) };
    let expected = with_session(own(&context, Action::Login), session.grant.session_id);
    assert_eq!(audit_event_of(store, store.open_session(session)).await, expected);

    for user_id in [Some(user.id), None] {
        let context = audit_context_by(None);
        let expected = AuditEvent { user: user_id, ..event(&context, Action::LoginFailed, None, user.id) };
        assert_eq!(
            audit_event_of(store, store.attempt_failed(attempt(subject("ada@example.com")), user_id, context)).await,
            expected
        );
    }

    let (token, context) = (log_in(store, &user).await, audit_context_by(None));
    let logout = Logout { context, ..token.logout() };
    let expected = with_session(own(&context, Action::Logout), token.grant.session_id);
    assert_eq!(audit_event_of(store, store.logout(logout)).await, expected);

    // However many sessions end, the row names the one whose token was presented.
    log_in(store, &user).await;
    let (token, context) = (log_in(store, &user).await, audit_context_by(None));
    let logout = Logout { context, ..token.logout_everywhere() };
    let expected = with_session(own(&context, Action::LogoutEverywhere), token.grant.session_id);
    assert_eq!(audit_event_of(store, store.logout(logout)).await, expected);

    // A consumed token does not authenticate its user, so the row has no actor.
    for way in ["refresh", "logout", "logout everywhere"] {
        let (consumed, context) = (log_in(store, &user).await, audit_context_by(None));
        let newer = refresh(store, &consumed).await;
        refresh(store, &newer).await;
        let expected = with_session(event(&context, Action::RefreshReused, None, user.id), consumed.grant.session_id);
        let event = match way {
            "refresh" => audit_event_of(store, store.rotate_refresh(Rotation { context, ..consumed.rotation() })).await,
            "logout" => audit_event_of(store, store.logout(Logout { context, ..consumed.logout() })).await,
            _ => audit_event_of(store, store.logout(Logout { context, ..consumed.logout_everywhere() })).await,
        };
        assert_eq!(event, expected, "{way}");
    }

    let (token, context) = (log_in(store, &user).await, audit_context_by(Some(user.id)));
    let expected = with_session(own(&context, Action::SessionRevoked), token.grant.session_id);
    assert_eq!(audit_event_of(store, store.revoke_session(token.grant.session_id, user.id, context)).await, expected);
}

async fn each_administrative_step_writes_one_audit_row(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let user = sign_up_without_mail(database, store, "ada").await;
    // `None` is the command line.
    for admin in [Some(sign_up_admin(database, store, "grace").await.id), None] {
        let context = audit_context_by(admin);
        let expected = with_detail(event(&context, Action::RolesChanged, admin, user.id), "user -> support user");
        assert_eq!(
            audit_event_of(store, store.set_roles(user.id, roles(&["support", "user"]), context)).await,
            expected
        );

        let context = audit_context_by(admin);
        let expected = with_detail(event(&context, Action::RolesChanged, admin, user.id), "support user -> user");
        assert_eq!(audit_event_of(store, store.set_roles(user.id, roles(&["user"]), context)).await, expected);

        for _ in 0..2 {
            store.open_session(new_session(user.id)).await.expect("the store");
        }
        let context = audit_context_by(admin);
        let expected = event(&context, Action::SessionsRevoked, admin, user.id);
        assert_eq!(audit_event_of(store, store.revoke_user_sessions(user.id, context)).await, expected);

        for reason in [Some("spam; \"bots\""), None] {
            store.open_session(new_session(user.id)).await.expect("the store");
            let context = audit_context_by(admin);
            let expected = event(&context, Action::UserDisabled, admin, user.id);
            let expected = AuditEvent { detail: reason.map(str::to_owned), ..expected };
            let disabling = store.disable_user(user.id, reason.map(str::to_owned), context);
            assert_eq!(audit_event_of(store, disabling).await, expected);

            let context = audit_context_by(admin);
            let expected = event(&context, Action::UserEnabled, admin, user.id);
            assert_eq!(audit_event_of(store, store.enable_user(user.id, context)).await, expected);
        }

        let (other, context) = (sign_up_without_mail(database, store, "linus").await, audit_context_by(admin));
        log_in(store, &other).await;
        let expected = event(&context, Action::UserDeleted, admin, other.id);
        assert_eq!(
            audit_event_of(store, store.delete_user(UserDeletion { context, ..deletion(&other) })).await,
            expected
        );
    }
}

/// Runs a step and asserts that it writes no audit row and no revocation.
async fn assert_not_recorded<T>(database: &Database, what: &str, step: impl Future<Output = T>) {
    let rows = async || [database.rows_of("audit_events").await, database.rows_of("revocations").await];
    let before = rows().await;
    step.await;
    assert_eq!(rows().await, before, "{what}");
}

async fn session_steps_that_change_nothing_write_no_audit_row(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let wrong = NewSession { password_version: 7, ..new_session(user.id) };
    assert_not_recorded(database, "a refused login", store.open_session(wrong)).await;
    let first = log_in(store.as_ref(), &user).await;
    let current = first.successor("");
    assert_not_recorded(database, "a refresh", store.rotate_refresh(first.replaced_by(&current))).await;
    assert_not_recorded(database, "a replay", store.rotate_refresh(first.replaced_by(&current))).await;

    let gone = Token { grant: new_session(user.id).grant, hash: first.hash };
    assert_not_recorded(database, "a refresh of an unknown session", store.rotate_refresh(gone.rotation())).await;
    assert_not_recorded(database, "a logout of an unknown session", store.logout(gone.logout())).await;
    assert_not_recorded(database, "a logout everywhere of an unknown session", store.logout(gone.logout_everywhere()))
        .await;

    let everywhere = log_in(store.as_ref(), &user).await;
    store.logout(everywhere.logout_everywhere()).await.expect("the store");
    for token in [&everywhere, &current] {
        assert_not_recorded(database, "a repeated logout", store.logout(token.logout())).await;
        assert_not_recorded(database, "a repeated logout everywhere", store.logout(token.logout_everywhere())).await;
        assert_not_recorded(database, "a refresh of an ended session", store.rotate_refresh(token.rotation())).await;
        let revoking = store.revoke_session(token.grant.session_id, user.id, audit_context());
        assert_not_recorded(database, "a revocation of an ended session", revoking).await;
    }
    let other = sign_up_without_mail(database, store.as_ref(), "grace").await;
    let token = log_in(store.as_ref(), &other).await;
    let revoking = store.revoke_session(token.grant.session_id, user.id, audit_context());
    assert_not_recorded(database, "a revocation of another user's session", revoking).await;
    let id = token.grant.session_id;
    let stranger = Token { grant: new_session(user.id).grant, hash: token.hash };
    let mut logout = stranger.logout_everywhere();
    logout.session_id = id;
    assert_not_recorded(database, "a logout of another user's session", store.logout(logout)).await;
}

async fn account_steps_that_change_nothing_write_no_audit_row(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let other = sign_up_without_mail(database, store.as_ref(), "grace").await;
    assert_not_recorded(database, "a sign-up with a taken address", store.create_account(new_account("ada"))).await;
    let username = new_account("ada").username;
    let taken = NewAccount { username, ..new_account("linus") };
    assert_not_recorded(database, "a sign-up with a taken username", store.create_account(taken)).await;
    let to_owner = mail(postern::domain::mail::MailKind::AccountExists, "ada@example.com", None);
    let owner_notice = NewAccount { owner_notice: Some(to_owner), email: user.email.clone(), ..new_account("linus") };
    assert_not_recorded(database, "a concealed sign-up with a taken address", store.create_account(owner_notice)).await;

    let tokens = [
        token(store.as_ref(), &user, Purpose::VerifyEmail).await,
        token(store.as_ref(), &user, Purpose::ResetPassword).await,
        token(store.as_ref(), &user, Purpose::ChangeEmail).await,
    ];
    let dead = tokens
        .map(|token| postern::domain::one_time::OneTimeGrant { id: postern::domain::ids::MailId(new_id()), ..token });
    let [verify, reset, change] = dead;
    assert_not_recorded(database, "a verification", store.verify_email(verification(verify, audit_context()))).await;
    assert_not_recorded(database, "a reset", store.reset_password(reset_by(reset))).await;
    assert_not_recorded(database, "a confirmation", store.confirm_email_change(confirmation_by(change))).await;

    let wrong = password_change(&user);
    let wrong = PasswordChange { session: NewSession { password_version: 7, ..wrong.session.clone() }, ..wrong };
    assert_not_recorded(database, "a change of the password", store.change_password(wrong)).await;
    let wrong = EmailChange { password_version: 7, ..email_change(&user, "new@example.com") };
    assert_not_recorded(database, "a change of the address", store.request_email_change(wrong)).await;
    database.set_user(other.id, "email_verified = true").await;
    let taken = email_change(&user, other.email.as_str());
    assert_not_recorded(database, "a change to a taken address", store.request_email_change(taken)).await;
    let taken = username_change(&user, other.username.as_str());
    assert_not_recorded(database, "a change to a taken username", store.change_username(taken)).await;
    queue_mail(store.as_ref(), &mail(postern::domain::mail::MailKind::ResetPassword, "new@example.com", None)).await;
    let limit = AddressLimit { burst: 1, ..LIMIT };
    let too_many = EmailChange { limit, ..email_change(&user, "new@example.com") };
    assert_not_recorded(database, "a change over the limit", store.request_email_change(too_many)).await;
}

async fn administrative_steps_that_change_nothing_write_no_audit_row(database: &Database) {
    let store = database.store().await;
    let admin = sign_up_admin(database, store.as_ref(), "ada").await;
    let user = sign_up_without_mail(database, store.as_ref(), "grace").await;
    let unknown = UserId(new_id());
    log_in(store.as_ref(), &admin).await;
    assert_not_recorded(database, "the same roles", store.set_roles(user.id, roles(&["user"]), audit_context())).await;
    assert_not_recorded(database, "enabling an enabled account", store.enable_user(user.id, audit_context())).await;
    store.disable_user(user.id, None, audit_context()).await.expect("the store");
    let again = store.disable_user(user.id, Some("again".to_owned()), audit_context());
    assert_not_recorded(database, "disabling a disabled account", again).await;

    assert_not_recorded(
        database,
        "the roles of an unknown account",
        store.set_roles(unknown, roles(&["admin"]), audit_context()),
    )
    .await;
    assert_not_recorded(database, "disabling an unknown account", store.disable_user(unknown, None, audit_context()))
        .await;
    assert_not_recorded(database, "enabling an unknown account", store.enable_user(unknown, audit_context())).await;
    assert_not_recorded(
        database,
        "the sessions of an unknown account",
        store.revoke_user_sessions(unknown, audit_context()),
    )
    .await;
    let gone = User { id: unknown, ..user.clone() };
    assert_not_recorded(database, "deleting an unknown account", store.delete_user(deletion(&gone))).await;

    let wrong = UserDeletion { password_version: Some(7), ..deletion(&admin) };
    assert_not_recorded(database, "a refused deletion", store.delete_user(wrong)).await;
    assert_not_recorded(
        database,
        "the last admin's roles",
        store.set_roles(admin.id, roles(&["user"]), audit_context()),
    )
    .await;
    assert_not_recorded(database, "disabling the last admin", store.disable_user(admin.id, None, audit_context()))
        .await;
    assert_not_recorded(database, "deleting the last admin", store.delete_user(deletion(&admin))).await;
}

async fn audit_rows_remain_after_deletion_and_contain_no_address(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "grace").await;
    let session = log_in(store.as_ref(), &user).await;
    store.request_email_change(email_change(&user, "newer@example.com")).await.expect("the store");
    let change = token(store.as_ref(), &user, Purpose::ChangeEmail).await;
    store.confirm_email_change(confirmation_by(change)).await.expect("the store");
    log_out(store.as_ref(), &session).await;
    let before = audit(store.as_ref()).await;
    let context = audit_context();
    let deletion = UserDeletion { context, ..deletion(&user) };
    store.delete_user(deletion).await.expect("the store");

    let mut after = audit(store.as_ref()).await;
    let ids: Vec<AuditEventId> = after.iter().map(|event| event.id).collect();
    after.retain(|event| event.id != context.event);
    assert_eq!(after, before);
    assert_eq!(ids.len(), 6, "sign-up, login, email change requested, email changed, logout, deletion");
    for row in database.rows_of("audit_events").await {
        // No id contains this name by chance: its letters are no hexadecimal digits.
        assert!(!row.contains("example.com") && !row.contains("grace"), "{row}");
    }
}
