//! Changing a password, by a mailed token or by the current password: what it ends, and what it keeps.

use postern::domain::{
    account::User,
    ids::UserId,
    mail::{MailKind, NewMail},
    one_time::{OneTimeGrant, Purpose},
    ports::{NewSession, PasswordChange, PasswordReset, PasswordResetOutcome, SessionOpening, Store},
};
use time::ext::NumericalDuration as _;

use crate::{
    fixtures::{
        NEW_HASH, NOW, OLD_HASH, Token, audit_context_at, deliver, is_alive, log_in, log_out, mail, mail_with_token,
        new_id, new_session, password_change, queue_mail, reset_by, sign_up_without_mail, token,
    },
    support::{Database, on_each_engine},
};

on_each_engine![
    a_reset_sets_the_password_and_verifies_the_address,
    a_reset_ends_all_sessions_of_that_user_only,
    a_reset_voids_all_tokens_of_its_user_and_the_mails_that_carry_tokens,
    a_reset_queues_its_notice,
    the_password_of_a_disabled_account_is_not_reset,
    the_password_of_an_account_with_a_new_address_is_not_reset,
    a_change_sets_the_password_and_opens_a_session,
    a_change_ends_all_other_sessions_of_that_user_only,
    a_change_voids_reset_and_email_change_tokens_and_keeps_verification_tokens,
    a_change_queues_its_notice,
    a_change_is_refused_if_the_password_has_changed_since_it_was_verified,
];

async fn reset(store: &dyn Store, reset: PasswordReset) {
    assert_eq!(store.reset_password(reset).await.expect("the store"), PasswordResetOutcome::Reset);
}

async fn change(store: &dyn Store, change: PasswordChange) -> User {
    match store.change_password(change).await.expect("the store") {
        SessionOpening::Opened(user) | SessionOpening::OpenedTooMany(user) => user,
        SessionOpening::Refused => panic!("the change was refused"),
    }
}

/// Asserts that only the password has changed, and that the old one opens no session.
async fn assert_new_password(store: &dyn Store, expected: &User) {
    let credentials = store.credentials(&expected.email).await.expect("the store").expect("an account");
    assert_eq!(credentials.user, *expected);
    assert_eq!((credentials.password_hash.as_str(), credentials.password_version), (NEW_HASH, 1));
    let with_old_password = store.open_session(new_session(expected.id)).await.expect("the store");
    assert_eq!(with_old_password, SessionOpening::Refused);
    let with_new_password = NewSession { password_version: 1, ..new_session(expected.id) };
    let opening = store.open_session(with_new_password).await.expect("the store");
    assert_eq!(opening, SessionOpening::Opened(expected.clone()));
}

async fn a_reset_sets_the_password_and_verifies_the_address(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let other = sign_up_without_mail(database, store.as_ref(), "grace").await;
    let token = token(store.as_ref(), &user, Purpose::ResetPassword).await;
    let now = NOW + 1.minutes();
    reset(store.as_ref(), PasswordReset { context: audit_context_at(now), ..reset_by(token) }).await;
    assert_eq!(database.sessions_where("true").await, 0, "a reset opens no session");
    assert_new_password(store.as_ref(), &User { email_verified: true, update_time: now, ..user }).await;
    let credentials = store.credentials(&other.email).await.expect("the store").expect("an account");
    assert_eq!((credentials.user, credentials.password_hash.as_str()), (other, OLD_HASH));
}

/// Two open sessions of a user, an ended one, and a session of another user.
async fn sessions(store: &dyn Store, user: &User, other: &User) -> ([Token; 2], Token, Token) {
    let live = [log_in(store, user).await, log_in(store, user).await];
    let ended = log_in(store, user).await;
    log_out(store, &ended).await;
    (live, ended, log_in(store, other).await)
}

async fn a_reset_ends_all_sessions_of_that_user_only(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let other = sign_up_without_mail(database, store.as_ref(), "grace").await;
    let (live, ended, other_session) = sessions(store.as_ref(), &user, &other).await;
    let unchanged = [database.session_row(&ended).await, database.session_row(&other_session).await];
    let token = token(store.as_ref(), &user, Purpose::ResetPassword).await;
    reset(store.as_ref(), reset_by(token)).await;
    for token in &live {
        assert!(database.is_revoked(token).await);
        assert!(!is_alive(store.as_ref(), token).await);
    }
    assert_eq!(database.sessions_where("revoke_reason = 'password_reset'").await, 2);
    assert_eq!(database.sessions_where("revoke_reason = 'logout'").await, 1);
    assert_eq!([database.session_row(&ended).await, database.session_row(&other_session).await], unchanged);
}

/// Live tokens of a user, one per purpose.
async fn tokens(store: &dyn Store, user: &User) -> Vec<OneTimeGrant> {
    let mut tokens = Vec::new();
    for purpose in Purpose::ALL {
        tokens.push(token(store, user, purpose).await);
    }
    tokens
}

/// Queues for a user every mail that carries a token, by the user's id and by the address, and a notice.
async fn queue_mails_for(store: &dyn Store, user: &User) {
    for purpose in Purpose::ALL {
        queue_mail(store, &mail_with_token(user, purpose)).await;
    }
    for purpose in [Purpose::VerifyEmail, Purpose::ResetPassword] {
        queue_mail(store, &NewMail { user_id: None, ..mail_with_token(user, purpose) }).await;
    }
    queue_mail(store, &mail(MailKind::AccountExists, user.email.as_str(), None)).await;
}

const MAILS_TO_GRACE: [&str; 6] = [
    "account_exists to grace@example.com",
    "confirm_email_change to new-grace@example.com",
    "reset_password to grace@example.com",
    "reset_password to grace@example.com",
    "verify_email to grace@example.com",
    "verify_email to grace@example.com",
];

async fn a_reset_voids_all_tokens_of_its_user_and_the_mails_that_carry_tokens(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let other = sign_up_without_mail(database, store.as_ref(), "grace").await;
    let user_tokens = tokens(store.as_ref(), &user).await;
    let other_tokens = tokens(store.as_ref(), &other).await;
    queue_mails_for(store.as_ref(), &user).await;
    queue_mails_for(store.as_ref(), &other).await;
    // This mail belongs to the other account, although it goes to the address of the first.
    queue_mail(store.as_ref(), &mail(MailKind::ConfirmEmailChange, "ada@example.com", Some(other.id))).await;

    reset(store.as_ref(), reset_by(user_tokens[1].clone())).await;
    let mut expected = [
        "account_exists to ada@example.com",
        "confirm_email_change to ada@example.com",
        "password_changed to ada@example.com",
    ]
    .to_vec();
    expected.extend(MAILS_TO_GRACE);
    expected.sort_unstable();
    assert_eq!(database.outbox().await, expected);
    for token in user_tokens {
        assert_eq!(store.one_time_token(token.id).await.expect("the store"), None, "{token:?}");
    }
    for token in other_tokens {
        assert!(store.one_time_token(token.id).await.expect("the store").is_some(), "{token:?}");
    }
}

async fn assert_notice(store: &dyn Store, user: &User, notice: &NewMail) {
    let delivered = deliver(store).await;
    assert_eq!(delivered.len(), 1, "{delivered:?}");
    let sent = &delivered[0];
    assert_eq!((sent.id, sent.kind, &sent.recipient), (notice.id, MailKind::PasswordChanged, &user.email));
    assert_eq!(sent.grant, None);
}

async fn a_reset_queues_its_notice(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let by_token = reset_by(token(store.as_ref(), &user, Purpose::ResetPassword).await);
    reset(store.as_ref(), by_token.clone()).await;
    assert_notice(store.as_ref(), &user, &by_token.notice).await;
}

async fn assert_not_reset(database: &Database, store: &dyn Store, token: OneTimeGrant) {
    let before = database.everything().await;
    let outcome = store.reset_password(reset_by(token)).await.expect("the store");
    assert_eq!(outcome, PasswordResetOutcome::TokenDead);
    assert_eq!(database.everything().await, before);
}

async fn the_password_of_a_disabled_account_is_not_reset(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    log_in(store.as_ref(), &user).await;
    let token = token(store.as_ref(), &user, Purpose::ResetPassword).await;
    database.set_user(user.id, "disabled = true").await;
    assert_not_reset(database, store.as_ref(), token.clone()).await;
    database.set_user(user.id, "disabled = false").await;
    reset(store.as_ref(), reset_by(token)).await;
}

async fn the_password_of_an_account_with_a_new_address_is_not_reset(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    log_in(store.as_ref(), &user).await;
    let token = token(store.as_ref(), &user, Purpose::ResetPassword).await;
    database.set_user(user.id, "email = 'lovelace@example.com'").await;
    assert_not_reset(database, store.as_ref(), token).await;
}

async fn a_change_sets_the_password_and_opens_a_session(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let other = sign_up_without_mail(database, store.as_ref(), "grace").await;
    let mut by_password = password_change(&user);
    by_password.session.context = audit_context_at(NOW + 1.minutes());
    by_password.session.user_agent = Some("curl/8".to_owned());
    let session = by_password.session.clone();
    let changed = change(store.as_ref(), by_password).await;

    assert_eq!(changed, User { update_time: NOW + 1.minutes(), ..user }, "the address does not become verified");
    let new_token = Token { grant: session.grant, hash: session.refresh_hash };
    assert!(is_alive(store.as_ref(), &new_token).await);
    assert_eq!(database.sessions_where("user_agent = 'curl/8' AND generation = 0").await, 1);
    assert_new_password(store.as_ref(), &changed).await;
    let credentials = store.credentials(&other.email).await.expect("the store").expect("an account");
    assert_eq!((credentials.user, credentials.password_hash.as_str()), (other, OLD_HASH));
}

async fn a_change_ends_all_other_sessions_of_that_user_only(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let other = sign_up_without_mail(database, store.as_ref(), "grace").await;
    let (live, ended, other_session) = sessions(store.as_ref(), &user, &other).await;
    let unchanged = [database.session_row(&ended).await, database.session_row(&other_session).await];
    change(store.as_ref(), password_change(&user)).await;
    for token in &live {
        assert!(database.is_revoked(token).await);
        assert!(!is_alive(store.as_ref(), token).await);
    }
    assert_eq!(database.sessions_where("revoke_reason = 'password_changed'").await, 2);
    assert_eq!(database.sessions_where("revoke_time IS NULL").await, 2, "the new session and that of the other user");
    assert_eq!([database.session_row(&ended).await, database.session_row(&other_session).await], unchanged);
}

async fn a_change_voids_reset_and_email_change_tokens_and_keeps_verification_tokens(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let other = sign_up_without_mail(database, store.as_ref(), "grace").await;
    let user_tokens = tokens(store.as_ref(), &user).await;
    let other_tokens = tokens(store.as_ref(), &other).await;
    queue_mails_for(store.as_ref(), &user).await;
    queue_mails_for(store.as_ref(), &other).await;

    change(store.as_ref(), password_change(&user)).await;
    let verify = "verify_email to ada@example.com";
    let mut expected =
        ["account_exists to ada@example.com", "password_changed to ada@example.com", verify, verify].to_vec();
    expected.extend(MAILS_TO_GRACE);
    expected.sort_unstable();
    assert_eq!(database.outbox().await, expected);
    for token in user_tokens {
        let is_live = store.one_time_token(token.id).await.expect("the store").is_some();
        assert_eq!(is_live, token.purpose == Purpose::VerifyEmail, "{token:?}");
    }
    for token in other_tokens {
        assert!(store.one_time_token(token.id).await.expect("the store").is_some(), "{token:?}");
    }
}

async fn a_change_queues_its_notice(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let by_password = password_change(&user);
    change(store.as_ref(), by_password.clone()).await;
    assert_notice(store.as_ref(), &user, &by_password.notice).await;
}

async fn a_change_is_refused_if_the_password_has_changed_since_it_was_verified(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    log_in(store.as_ref(), &user).await;
    tokens(store.as_ref(), &user).await;
    let unknown = User { id: UserId(new_id()), ..user.clone() };
    for (change, account) in
        [("password_version = 1", &user), ("disabled = true", &user), ("disabled = false", &unknown)]
    {
        database.set_user(user.id, "password_version = 0, disabled = false").await;
        database.set_user(user.id, change).await;
        let before = database.everything().await;
        let opening = store.change_password(password_change(account)).await.expect("the store");
        assert_eq!(opening, SessionOpening::Refused, "{change}");
        assert_eq!(database.everything().await, before, "{change}");
    }
}
