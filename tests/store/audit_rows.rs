//! What each step leaves in the audit: one row that tells of it, or none where nothing was changed.

use postern::domain::{
    account::User,
    audit::{Action, AuditContext, AuditEvent},
    ids::{AuditEventId, SessionId, UserId},
    one_time::Purpose,
    ports::{
        EmailChange, EmailConfirmation, Logout, NewAccount, NewSession, PasswordChange, PasswordReset, Rotation, Store,
        UserDeletion,
    },
    throttle::AddressLimit,
};

use crate::{
    fixtures::{
        LIMIT, Token, audit, audit_context, audit_context_of, confirmation_by, deletion, email_change, log_in, log_out,
        mail, new_account, new_id, new_session, password_change, post, refresh, reset_by, roles, sign_up_admin,
        sign_up_quietly, token,
    },
    support::{Database, on_each_engine},
};

on_each_engine![
    what_people_do_to_their_accounts_is_told_by_one_row_each,
    what_becomes_of_sessions_is_told_by_one_row_each,
    what_admins_do_is_told_by_one_row_each,
    steps_on_sessions_that_change_nothing_are_not_told,
    steps_on_accounts_that_change_nothing_are_not_told,
    administrative_steps_that_change_nothing_are_not_told,
    the_audit_outlives_its_users_and_holds_no_address,
];

/// Makes a step and hands out the one row that it left.
async fn told<T>(store: &dyn Store, step: impl Future<Output = T>) -> AuditEvent {
    let before = audit(store).await;
    step.await;
    let mut new: Vec<_> = audit(store).await.into_iter().filter(|event| !before.contains(event)).collect();
    let event = new.pop().expect("a row");
    assert_eq!(new, [], "beside {event:?}");
    event
}

/// What is to be told of a step.
fn event(of: &AuditContext, action: Action, actor: Option<UserId>, user: UserId) -> AuditEvent {
    AuditEvent {
        id: of.event,
        create_time: of.now,
        action: action.as_str().to_owned(),
        actor,
        user: Some(user),
        session: None,
        client_ip: Some("2001:db8::7".to_owned()),
        detail: None,
    }
}

fn with(event: AuditEvent, session: SessionId) -> AuditEvent {
    AuditEvent { session: Some(session), ..event }
}

fn saying(event: AuditEvent, detail: &str) -> AuditEvent {
    AuditEvent { detail: Some(detail.to_owned()), ..event }
}

async fn what_people_do_to_their_accounts_is_told_by_one_row_each(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    // Who made an account, its owner or an operator, is known before.
    let of = audit_context_of(None);
    let account = NewAccount { context: of, ..new_account("ada") };
    let id = account.id;
    assert_eq!(told(store, store.create_account(account)).await, event(&of, Action::SignUp, None, id));
    // Who verifies, resets or confirms is known by the step alone.
    let own = |of: &AuditContext, action| event(of, action, Some(id), id);

    let user = store.user(id).await.expect("the store").expect("an account");
    let (verify, of) = (token(store, &user, Purpose::VerifyEmail).await, audit_context_of(None));
    assert_eq!(told(store, store.verify_email(verify, of)).await, own(&of, Action::EmailVerified));

    let of = audit_context_of(Some(id));
    let asked = EmailChange { context: of, ..email_change(&user, "new@example.com") };
    assert_eq!(told(store, store.request_email_change(asked)).await, own(&of, Action::EmailChangeRequested));

    let of = audit_context_of(None);
    let confirmed = confirmation_by(token(store, &user, Purpose::ChangeEmail).await);
    let confirmed = EmailConfirmation { context: of, ..confirmed };
    assert_eq!(told(store, store.confirm_email_change(confirmed)).await, own(&of, Action::EmailChanged));

    let of = audit_context_of(Some(id));
    let change = password_change(&user);
    let change = PasswordChange { session: NewSession { context: of, ..change.session.clone() }, ..change };
    let expected = with(own(&of, Action::PasswordChanged), change.session.grant.session_id);
    assert_eq!(told(store, store.change_password(change)).await, expected);

    let user = store.user(id).await.expect("the store").expect("an account");
    let of = audit_context_of(None);
    let reset = reset_by(token(store, &user, Purpose::ResetPassword).await);
    let reset = PasswordReset { context: of, ..reset };
    assert_eq!(told(store, store.reset_password(reset)).await, own(&of, Action::PasswordReset));

    let of = audit_context_of(Some(id));
    let deletion = UserDeletion { context: of, password_version: Some(2), ..deletion(&user) };
    assert_eq!(told(store, store.delete_user(deletion)).await, own(&of, Action::UserDeleted));
}

async fn what_becomes_of_sessions_is_told_by_one_row_each(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let user = sign_up_quietly(database, store, "ada").await;
    let own = |of: &AuditContext, action| event(of, action, Some(user.id), user.id);

    let of = audit_context_of(None);
    let session = NewSession { context: of, ..new_session(user.id) };
    let expected = with(own(&of, Action::Login), session.grant.session_id);
    assert_eq!(told(store, store.open_session(session)).await, expected);

    for who in [Some(user.id), None] {
        let of = audit_context_of(None);
        let expected = AuditEvent { user: who, ..event(&of, Action::LoginFailed, None, user.id) };
        assert_eq!(told(store, store.login_failed(who, of)).await, expected);
    }

    let (token, of) = (log_in(store, &user).await, audit_context_of(None));
    let logout = Logout { context: of, ..token.logout() };
    let expected = with(own(&of, Action::Logout), token.grant.session_id);
    assert_eq!(told(store, store.logout(logout)).await, expected);

    // However many end: the row is of the one that asked.
    log_in(store, &user).await;
    let (token, of) = (log_in(store, &user).await, audit_context_of(None));
    let logout = Logout { context: of, ..token.logout_everywhere() };
    let expected = with(own(&of, Action::LogoutEverywhere), token.grant.session_id);
    assert_eq!(told(store, store.logout(logout)).await, expected);

    // A token that is used up speaks for nobody, however it is presented.
    for everywhere in [false, true] {
        let (spent, of) = (log_in(store, &user).await, audit_context_of(None));
        let newer = refresh(store, &spent).await;
        refresh(store, &newer).await;
        let expected = with(event(&of, Action::RefreshReused, None, user.id), spent.grant.session_id);
        let event = if everywhere {
            told(store, store.logout(Logout { context: of, ..spent.logout_everywhere() })).await
        } else {
            told(store, store.rotate_refresh(Rotation { context: of, ..spent.rotation() })).await
        };
        assert_eq!(event, expected);
    }

    let (token, of) = (log_in(store, &user).await, audit_context_of(Some(user.id)));
    let expected = with(own(&of, Action::SessionRevoked), token.grant.session_id);
    assert_eq!(told(store, store.revoke_session(token.grant.session_id, user.id, of)).await, expected);
}

async fn what_admins_do_is_told_by_one_row_each(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let user = sign_up_quietly(database, store, "ada").await;
    // The command line is nobody known.
    for admin in [Some(sign_up_admin(database, store, "grace").await.id), None] {
        let of = audit_context_of(admin);
        let expected = saying(event(&of, Action::RolesChanged, admin, user.id), "user -> support user");
        assert_eq!(told(store, store.set_roles(user.id, roles(&["support", "user"]), of)).await, expected);

        let of = audit_context_of(admin);
        let expected = saying(event(&of, Action::RolesChanged, admin, user.id), "support user -> user");
        assert_eq!(told(store, store.set_roles(user.id, roles(&["user"]), of)).await, expected);

        for _ in 0..2 {
            store.open_session(new_session(user.id)).await.expect("the store");
        }
        let of = audit_context_of(admin);
        let expected = event(&of, Action::SessionsRevoked, admin, user.id);
        assert_eq!(told(store, store.revoke_user_sessions(user.id, of)).await, expected);

        for reason in [Some("spam; \"bots\""), None] {
            store.open_session(new_session(user.id)).await.expect("the store");
            let of = audit_context_of(admin);
            let expected = event(&of, Action::UserDisabled, admin, user.id);
            let expected = AuditEvent { detail: reason.map(str::to_owned), ..expected };
            let disabling = store.disable_user(user.id, reason.map(str::to_owned), of);
            assert_eq!(told(store, disabling).await, expected);

            let of = audit_context_of(admin);
            let expected = event(&of, Action::UserEnabled, admin, user.id);
            assert_eq!(told(store, store.enable_user(user.id, of)).await, expected);
        }

        let (other, of) = (sign_up_quietly(database, store, "linus").await, audit_context_of(admin));
        log_in(store, &other).await;
        let expected = event(&of, Action::UserDeleted, admin, other.id);
        assert_eq!(told(store, store.delete_user(UserDeletion { context: of, ..deletion(&other) })).await, expected);
    }
}

/// Makes a step and sees that neither the audit nor the log of revocations has anything new.
async fn assert_not_told<T>(database: &Database, what: &str, step: impl Future<Output = T>) {
    let told = async || [database.rows_of("audit_events").await, database.rows_of("revocations").await];
    let before = told().await;
    step.await;
    assert_eq!(told().await, before, "{what}");
}

async fn steps_on_sessions_that_change_nothing_are_not_told(database: &Database) {
    let store = database.store().await;
    let user = sign_up_quietly(database, store.as_ref(), "ada").await;
    let wrong = NewSession { password_version: 7, ..new_session(user.id) };
    assert_not_told(database, "a login that is refused", store.open_session(wrong)).await;
    let first = log_in(store.as_ref(), &user).await;
    let live = first.successor("");
    assert_not_told(database, "a refresh", store.rotate_refresh(first.replaced_by(&live))).await;
    assert_not_told(database, "a retry", store.rotate_refresh(first.replaced_by(&live))).await;

    let gone = Token { grant: new_session(user.id).grant, hash: first.hash };
    assert_not_told(database, "a refresh of no session", store.rotate_refresh(gone.rotation())).await;
    assert_not_told(database, "a logout of no session", store.logout(gone.logout())).await;
    assert_not_told(database, "everywhere of no session", store.logout(gone.logout_everywhere())).await;

    let everywhere = log_in(store.as_ref(), &user).await;
    store.logout(everywhere.logout_everywhere()).await.expect("the store");
    for token in [&everywhere, &live] {
        assert_not_told(database, "a logout again", store.logout(token.logout())).await;
        assert_not_told(database, "everywhere again", store.logout(token.logout_everywhere())).await;
        assert_not_told(database, "a refresh of what is over", store.rotate_refresh(token.rotation())).await;
        let revoking = store.revoke_session(token.grant.session_id, user.id, audit_context());
        assert_not_told(database, "a revocation of what is over", revoking).await;
    }
    let other = sign_up_quietly(database, store.as_ref(), "grace").await;
    let token = log_in(store.as_ref(), &other).await;
    let revoking = store.revoke_session(token.grant.session_id, user.id, audit_context());
    assert_not_told(database, "a revocation of somebody else's", revoking).await;
    let id = token.grant.session_id;
    let stranger = Token { grant: new_session(user.id).grant, hash: token.hash };
    let mut logout = stranger.logout_everywhere();
    logout.session_id = id;
    assert_not_told(database, "a logout of somebody else's", store.logout(logout)).await;
}

async fn steps_on_accounts_that_change_nothing_are_not_told(database: &Database) {
    let store = database.store().await;
    let user = sign_up_quietly(database, store.as_ref(), "ada").await;
    let other = sign_up_quietly(database, store.as_ref(), "grace").await;
    assert_not_told(database, "an address that is taken", store.create_account(new_account("ada"))).await;
    let username = new_account("ada").username;
    let taken = NewAccount { username, ..new_account("linus") };
    assert_not_told(database, "a username that is taken", store.create_account(taken)).await;
    let to_its_owner = mail(postern::domain::mail::MailKind::AccountExists, "ada@example.com", None);
    let owner_notice =
        NewAccount { owner_notice: Some(to_its_owner), email: user.email.clone(), ..new_account("linus") };
    assert_not_told(database, "the same in concealment", store.create_account(owner_notice)).await;

    let tokens = [
        token(store.as_ref(), &user, Purpose::VerifyEmail).await,
        token(store.as_ref(), &user, Purpose::ResetPassword).await,
        token(store.as_ref(), &user, Purpose::ChangeEmail).await,
    ];
    let dead = tokens
        .map(|token| postern::domain::one_time::OneTimeGrant { id: postern::domain::ids::MailId(new_id()), ..token });
    let [verify, reset, change] = dead;
    assert_not_told(database, "a verification", store.verify_email(verify, audit_context())).await;
    assert_not_told(database, "a reset", store.reset_password(reset_by(reset))).await;
    assert_not_told(database, "a confirmation", store.confirm_email_change(confirmation_by(change))).await;

    let wrong = password_change(&user);
    let wrong = PasswordChange { session: NewSession { password_version: 7, ..wrong.session.clone() }, ..wrong };
    assert_not_told(database, "a change of the password", store.change_password(wrong)).await;
    let wrong = EmailChange { password_version: 7, ..email_change(&user, "new@example.com") };
    assert_not_told(database, "a change of the address", store.request_email_change(wrong)).await;
    let taken = email_change(&user, other.email.as_str());
    assert_not_told(database, "a change to a taken address", store.request_email_change(taken)).await;
    post(store.as_ref(), &mail(postern::domain::mail::MailKind::ResetPassword, "new@example.com", None)).await;
    let limit = AddressLimit { burst: 1, ..LIMIT };
    let too_many = EmailChange { limit, ..email_change(&user, "new@example.com") };
    assert_not_told(database, "a change over the limit", store.request_email_change(too_many)).await;
}

async fn administrative_steps_that_change_nothing_are_not_told(database: &Database) {
    let store = database.store().await;
    let admin = sign_up_admin(database, store.as_ref(), "ada").await;
    let user = sign_up_quietly(database, store.as_ref(), "grace").await;
    let nobody = UserId(new_id());
    log_in(store.as_ref(), &admin).await;
    assert_not_told(database, "the same roles", store.set_roles(user.id, roles(&["user"]), audit_context())).await;
    assert_not_told(database, "enabling the enabled", store.enable_user(user.id, audit_context())).await;
    store.disable_user(user.id, None, audit_context()).await.expect("the store");
    let again = store.disable_user(user.id, Some("again".to_owned()), audit_context());
    assert_not_told(database, "disabling the disabled", again).await;

    assert_not_told(database, "nobody's roles", store.set_roles(nobody, roles(&["admin"]), audit_context())).await;
    assert_not_told(database, "disabling nobody", store.disable_user(nobody, None, audit_context())).await;
    assert_not_told(database, "enabling nobody", store.enable_user(nobody, audit_context())).await;
    assert_not_told(database, "nobody's sessions", store.revoke_user_sessions(nobody, audit_context())).await;
    let gone = User { id: nobody, ..user.clone() };
    assert_not_told(database, "deleting nobody", store.delete_user(deletion(&gone))).await;

    let wrong = UserDeletion { password_version: Some(7), ..deletion(&admin) };
    assert_not_told(database, "a deletion that is refused", store.delete_user(wrong)).await;
    assert_not_told(database, "the last admin's roles", store.set_roles(admin.id, roles(&["user"]), audit_context()))
        .await;
    assert_not_told(database, "disabling the last admin", store.disable_user(admin.id, None, audit_context())).await;
    assert_not_told(database, "deleting the last admin", store.delete_user(deletion(&admin))).await;
}

async fn the_audit_outlives_its_users_and_holds_no_address(database: &Database) {
    let store = database.store().await;
    let user = sign_up_quietly(database, store.as_ref(), "ada").await;
    let session = log_in(store.as_ref(), &user).await;
    store.request_email_change(email_change(&user, "newer@example.com")).await.expect("the store");
    let change = token(store.as_ref(), &user, Purpose::ChangeEmail).await;
    store.confirm_email_change(confirmation_by(change)).await.expect("the store");
    log_out(store.as_ref(), &session).await;
    let before = audit(store.as_ref()).await;
    let of = audit_context();
    let deletion = UserDeletion { context: of, ..deletion(&user) };
    store.delete_user(deletion).await.expect("the store");

    let mut after = audit(store.as_ref()).await;
    let told: Vec<AuditEventId> = after.iter().map(|event| event.id).collect();
    after.retain(|event| event.id != of.event);
    assert_eq!(after, before);
    assert_eq!(told.len(), 6, "sign-up, login, asked for a change, changed, logout, deletion");
    for row in database.rows_of("audit_events").await {
        assert!(!row.contains("example.com") && !row.contains("ada"), "{row}");
    }
}
