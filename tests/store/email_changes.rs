//! Another address: asking for it, and confirming it by the token that was mailed there.

use postern::domain::{
    account::User,
    ids::UserId,
    mail::{MailKind, NewMail},
    one_time::{OneTimeGrant, Purpose},
    ports::{
        ClaimedMail, EmailChange, EmailChangeRequest, EmailConfirmation, EmailConfirmationOutcome, OneTimeToken, Store,
    },
    throttle::AddressLimit,
};
use time::ext::NumericalDuration as _;

use crate::{
    fixtures::{
        LIMIT, NOW, address, audit_context_at, confirmation_by, deliver, email_change, log_in, mail, mail_with_token,
        new_id, post, sign_up_quietly, token,
    },
    support::{Database, on_each_engine},
};

on_each_engine![
    a_request_mails_a_token_to_the_new_address_and_a_notice_to_the_old,
    a_request_for_an_address_that_is_taken_is_refused,
    in_concealment_the_owner_of_the_address_is_mailed_instead,
    a_request_over_the_limit_of_the_new_address_mails_nobody,
    a_request_counts_against_the_limit_of_the_new_address_alone,
    in_concealment_a_request_over_the_limit_mails_nobody,
    a_request_is_refused_unless_the_password_is_the_one_that_was_verified,
    a_confirmation_changes_the_address_and_verifies_it,
    a_confirmation_tells_the_address_before,
    a_confirmation_ends_every_token_of_its_user_and_the_mails_that_would_bring_more,
    an_address_that_was_taken_meanwhile_leaves_the_token_good_and_changes_nothing,
    a_disabled_account_keeps_its_address,
];

async fn request(store: &dyn Store, change: EmailChange) -> EmailChangeRequest {
    store.request_email_change(change).await.expect("the store")
}

/// What a request mails: the notice last.
async fn deliver_both(store: &dyn Store) -> [ClaimedMail; 2] {
    let mut delivered = deliver(store).await;
    delivered.sort_by_key(|mail| mail.kind == MailKind::EmailChangeRequested);
    delivered.try_into().expect("two mails")
}

async fn a_request_mails_a_token_to_the_new_address_and_a_notice_to_the_old(database: &Database) {
    let store = database.store().await;
    let user = sign_up_quietly(database, store.as_ref(), "ada").await;
    // Concealment is about addresses that are taken.
    let owner_notice = Some(mail(MailKind::AccountExists, "new@example.com", None));
    let change = EmailChange { owner_notice, ..email_change(&user, "new@example.com") };
    assert_eq!(request(store.as_ref(), change.clone()).await, EmailChangeRequest::Requested);

    let [confirmation, notice] = deliver_both(store.as_ref()).await;
    assert_eq!((confirmation.id, confirmation.kind), (change.confirmation.id, MailKind::ConfirmEmailChange));
    assert_eq!((confirmation.recipient, &confirmation.username), (address("new@example.com"), &user.username));
    assert_eq!(confirmation.new_email, Some(address("new@example.com")));
    let grant = OneTimeGrant {
        id: confirmation.id,
        purpose: Purpose::ChangeEmail,
        user_id: user.id,
        email: address("new@example.com"),
    };
    assert_eq!(confirmation.grant.as_ref(), Some(&grant));
    let token = OneTimeToken { grant, expire_time: NOW + 24.hours(), user: user.clone() };
    assert_eq!(store.one_time_token(confirmation.id).await.expect("the store"), Some(token), "of the account as it is");

    assert_eq!((notice.id, notice.kind), (change.notice.id, MailKind::EmailChangeRequested));
    assert_eq!((notice.recipient, notice.username), (address("ada@example.com"), user.username));
    assert_eq!((notice.new_email, notice.grant), (Some(address("new@example.com")), None));
}

/// Sees a request come to nothing.
async fn assert_nothing_asked(
    database: &Database,
    store: &dyn Store,
    change: EmailChange,
    outcome: EmailChangeRequest,
) {
    let before = database.everything().await;
    assert_eq!(request(store, change).await, outcome);
    assert_eq!(database.everything().await, before);
}

async fn a_request_for_an_address_that_is_taken_is_refused(database: &Database) {
    let store = database.store().await;
    let user = sign_up_quietly(database, store.as_ref(), "ada").await;
    sign_up_quietly(database, store.as_ref(), "grace").await;
    let change = email_change(&user, "grace@example.com");
    assert_nothing_asked(database, store.as_ref(), change, EmailChangeRequest::EmailTaken).await;
}

fn in_concealment(user: &User, new: &str) -> EmailChange {
    EmailChange { owner_notice: Some(mail(MailKind::AccountExists, new, None)), ..email_change(user, new) }
}

async fn in_concealment_the_owner_of_the_address_is_mailed_instead(database: &Database) {
    let store = database.store().await;
    let user = sign_up_quietly(database, store.as_ref(), "ada").await;
    let owner = sign_up_quietly(database, store.as_ref(), "grace").await;
    let change = in_concealment(&user, "grace@example.com");
    assert_eq!(request(store.as_ref(), change.clone()).await, EmailChangeRequest::Requested);

    let [to_owner, notice] = deliver_both(store.as_ref()).await;
    assert_eq!(Some(to_owner.id), change.owner_notice.map(|mail| mail.id));
    assert_eq!((to_owner.kind, to_owner.recipient), (MailKind::AccountExists, owner.email));
    assert_eq!((to_owner.username, to_owner.grant), (owner.username, None));
    assert_eq!((notice.kind, notice.recipient), (MailKind::EmailChangeRequested, user.email), "as for any other");
    assert_eq!(database.tokens().await, Vec::<String>::new());
}

async fn a_request_over_the_limit_of_the_new_address_mails_nobody(database: &Database) {
    let store = database.store().await;
    let user = sign_up_quietly(database, store.as_ref(), "ada").await;
    let limit = AddressLimit { burst: 1, ..LIMIT };
    let change = |new| EmailChange { limit, ..email_change(&user, new) };
    assert_eq!(request(store.as_ref(), change("new@example.com")).await, EmailChangeRequest::Requested);
    assert_nothing_asked(database, store.as_ref(), change("new@example.com"), EmailChangeRequest::OverLimit).await;
    assert_eq!(request(store.as_ref(), change("newer@example.com")).await, EmailChangeRequest::Requested);
}

async fn a_request_counts_against_the_limit_of_the_new_address_alone(database: &Database) {
    let store = database.store().await;
    // The mails of its sign-up are all that this address may have; nobody can suppress its notice by that.
    let user = sign_up_quietly(database, store.as_ref(), "ada").await;
    let limit = AddressLimit { burst: 1, ..LIMIT };
    let before = database.sql.number("SELECT count(*) FROM mail_limits").await;
    let change = EmailChange { limit, ..email_change(&user, "new@example.com") };
    assert_eq!(request(store.as_ref(), change).await, EmailChangeRequest::Requested);
    let notice_and_token = ["confirm_email_change to new@example.com", "email_change_requested to ada@example.com"];
    assert_eq!(database.outbox().await, notice_and_token);
    assert_eq!(database.sql.number("SELECT count(*) FROM mail_limits").await, before + 1);
}

async fn in_concealment_a_request_over_the_limit_mails_nobody(database: &Database) {
    let store = database.store().await;
    let user = sign_up_quietly(database, store.as_ref(), "ada").await;
    sign_up_quietly(database, store.as_ref(), "grace").await;
    let limit = AddressLimit { burst: 1, ..LIMIT };
    let change = EmailChange { limit, ..in_concealment(&user, "grace@example.com") };
    assert_nothing_asked(database, store.as_ref(), change, EmailChangeRequest::OverLimit).await;
    // Only where it is concealed: who may be told is told.
    let change = EmailChange { limit, ..email_change(&user, "grace@example.com") };
    assert_nothing_asked(database, store.as_ref(), change, EmailChangeRequest::EmailTaken).await;
}

async fn a_request_is_refused_unless_the_password_is_the_one_that_was_verified(database: &Database) {
    let store = database.store().await;
    let user = sign_up_quietly(database, store.as_ref(), "ada").await;
    sign_up_quietly(database, store.as_ref(), "grace").await;
    let gone = User { id: UserId(new_id()), ..user.clone() };
    for (change, of) in [("password_version = 1", &user), ("disabled = true", &user), ("disabled = false", &gone)] {
        database.set_user(user.id, "password_version = 0, disabled = false").await;
        database.set_user(user.id, change).await;
        for new in ["new@example.com", "grace@example.com"] {
            for change in [email_change(of, new), in_concealment(of, new)] {
                assert_nothing_asked(database, store.as_ref(), change, EmailChangeRequest::Refused).await;
            }
        }
    }
}

async fn confirm(store: &dyn Store, confirmation: EmailConfirmation) -> EmailConfirmationOutcome {
    store.confirm_email_change(confirmation).await.expect("the store")
}

async fn a_confirmation_changes_the_address_and_verifies_it(database: &Database) {
    let store = database.store().await;
    let user = sign_up_quietly(database, store.as_ref(), "ada").await;
    let other = sign_up_quietly(database, store.as_ref(), "grace").await;
    let session = log_in(store.as_ref(), &user).await;
    let token = token(store.as_ref(), &user, Purpose::ChangeEmail).await;
    let now = NOW + 1.minutes();
    let outcome =
        confirm(store.as_ref(), EmailConfirmation { context: audit_context_at(now), ..confirmation_by(token) }).await;
    let email = address("new-ada@example.com");
    let expected = User { email: email.clone(), email_verified: true, update_time: now, ..user.clone() };
    assert_eq!(outcome, EmailConfirmationOutcome::Changed(expected.clone()));

    let credentials = store.credentials(&email).await.expect("the store").expect("an account");
    assert_eq!((credentials.user, credentials.password_version), (expected, 0));
    assert_eq!(store.credentials(&user.email).await.expect("the store"), None, "the address before is free");
    let unchanged = store.credentials(&other.email).await.expect("the store").expect("an account");
    assert_eq!(unchanged.user, other);
    assert!(!database.is_revoked(&session).await, "the password is the same");
}

async fn a_confirmation_tells_the_address_before(database: &Database) {
    let store = database.store().await;
    let user = sign_up_quietly(database, store.as_ref(), "ada").await;
    let token = token(store.as_ref(), &user, Purpose::ChangeEmail).await;
    let confirmation = EmailConfirmation { context: audit_context_at(NOW - 1.minutes()), ..confirmation_by(token) };
    let outcome = confirm(store.as_ref(), confirmation.clone()).await;
    assert!(matches!(outcome, EmailConfirmationOutcome::Changed(_)), "{outcome:?}");
    let [notice] = deliver(store.as_ref()).await.try_into().expect("one mail");
    assert_eq!((notice.id, notice.kind), (confirmation.notice, MailKind::EmailChanged));
    assert_eq!((notice.recipient, notice.username), (user.email, user.username));
    assert_eq!((notice.new_email, notice.grant), (Some(address("new-ada@example.com")), None));
    assert_eq!(notice.create_time, confirmation.context.now);
}

async fn a_confirmation_ends_every_token_of_its_user_and_the_mails_that_would_bring_more(database: &Database) {
    let store = database.store().await;
    let user = sign_up_quietly(database, store.as_ref(), "ada").await;
    let other = sign_up_quietly(database, store.as_ref(), "grace").await;
    for of in [&user, &other] {
        for purpose in [Purpose::VerifyEmail, Purpose::ResetPassword] {
            token(store.as_ref(), of, purpose).await;
        }
    }
    let change = token(store.as_ref(), &user, Purpose::ChangeEmail).await;
    for of in [&user, &other] {
        for purpose in Purpose::ALL {
            post(store.as_ref(), &mail_with_token(of, purpose)).await;
        }
        for purpose in [Purpose::VerifyEmail, Purpose::ResetPassword] {
            post(store.as_ref(), &NewMail { user_id: None, ..mail_with_token(of, purpose) }).await;
        }
        post(store.as_ref(), &mail(MailKind::PasswordChanged, of.email.as_str(), Some(of.id))).await;
    }

    let outcome = confirm(store.as_ref(), confirmation_by(change)).await;
    assert!(matches!(outcome, EmailConfirmationOutcome::Changed(_)), "{outcome:?}");
    assert_eq!(database.tokens().await, ["reset_password of grace@example.com", "verify_email of grace@example.com"]);
    let expected = [
        "confirm_email_change to new-grace@example.com",
        "email_changed to ada@example.com",
        "password_changed to ada@example.com",
        "password_changed to grace@example.com",
        "reset_password to grace@example.com",
        "reset_password to grace@example.com",
        "verify_email to grace@example.com",
        "verify_email to grace@example.com",
    ];
    assert_eq!(database.outbox().await, expected);
}

async fn an_address_that_was_taken_meanwhile_leaves_the_token_good_and_changes_nothing(database: &Database) {
    let store = database.store().await;
    let user = sign_up_quietly(database, store.as_ref(), "ada").await;
    let token = token(store.as_ref(), &user, Purpose::ChangeEmail).await;
    post(store.as_ref(), &mail_with_token(&user, Purpose::ResetPassword)).await;
    let other = sign_up_quietly(database, store.as_ref(), "new-ada").await;
    assert_eq!(other.email, token.email);

    let before = database.everything().await;
    for _ in 0..2 {
        let outcome = confirm(store.as_ref(), confirmation_by(token.clone())).await;
        assert_eq!(outcome, EmailConfirmationOutcome::EmailTaken);
        assert_eq!(database.everything().await, before);
    }
    database.delete_user(other.id).await;
    let outcome = confirm(store.as_ref(), confirmation_by(token)).await;
    assert!(matches!(outcome, EmailConfirmationOutcome::Changed(_)), "{outcome:?}");
}

async fn a_disabled_account_keeps_its_address(database: &Database) {
    let store = database.store().await;
    let user = sign_up_quietly(database, store.as_ref(), "ada").await;
    let token = token(store.as_ref(), &user, Purpose::ChangeEmail).await;
    database.set_user(user.id, "disabled = true").await;
    let before = database.everything().await;
    let outcome = confirm(store.as_ref(), confirmation_by(token.clone())).await;
    assert_eq!(outcome, EmailConfirmationOutcome::TokenDead);
    assert_eq!(database.everything().await, before);
    database.set_user(user.id, "disabled = false").await;
    let outcome = confirm(store.as_ref(), confirmation_by(token)).await;
    assert!(matches!(outcome, EmailConfirmationOutcome::Changed(_)), "{outcome:?}");
}
