//! Changing the address of an account: the request, and the confirmation by the token in the mail to the new address.

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
        new_id, queue_mail, sign_up_without_mail, token,
    },
    support::{Database, on_each_engine},
};

on_each_engine![
    a_request_mails_a_token_to_the_new_address_and_a_notice_to_the_old_one,
    a_request_for_a_taken_address_is_refused,
    a_concealed_request_mails_the_owner_of_the_address_instead,
    a_request_over_the_limit_of_the_new_address_queues_no_mail,
    a_request_counts_only_against_the_limit_of_the_new_address,
    a_concealed_request_over_the_limit_queues_no_mail,
    a_request_is_refused_if_the_password_has_changed_since_it_was_verified,
    a_confirmation_changes_the_address_and_verifies_it,
    a_confirmation_mails_a_notice_to_the_old_address,
    a_confirmation_voids_all_tokens_of_its_user_and_the_mails_that_carry_tokens,
    a_confirmation_of_a_meanwhile_taken_address_keeps_the_token_and_changes_nothing,
    a_disabled_account_cannot_confirm_a_new_address,
];

async fn request(store: &dyn Store, change: EmailChange) -> EmailChangeRequest {
    store.request_email_change(change).await.expect("the store")
}

/// The two mails of a request; the notice is the second.
async fn deliver_both(store: &dyn Store) -> [ClaimedMail; 2] {
    let mut delivered = deliver(store).await;
    delivered.sort_by_key(|mail| mail.kind == MailKind::EmailChangeRequested);
    delivered.try_into().expect("two mails")
}

async fn a_request_mails_a_token_to_the_new_address_and_a_notice_to_the_old_one(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    // Concealment only affects addresses that are taken.
    let owner_notice = Some(mail(MailKind::AccountExists, "new@example.com", None));
    let change = EmailChange { owner_notice, ..email_change(&user, "new@example.com") };
    assert_eq!(request(store.as_ref(), change.clone()).await, EmailChangeRequest::Requested);

    let [confirmation, notice] = deliver_both(store.as_ref()).await;
    assert_eq!((confirmation.id, confirmation.kind), (change.confirmation.id, MailKind::ConfirmEmailChange));
    assert_eq!(confirmation.recipient, address("new@example.com"));
    assert_eq!(confirmation.new_email, Some(address("new@example.com")));
    let grant = OneTimeGrant {
        id: confirmation.id,
        purpose: Purpose::ChangeEmail,
        user_id: user.id,
        email: address("new@example.com"),
    };
    assert_eq!(confirmation.grant.as_ref(), Some(&grant));
    let token = OneTimeToken { grant, expire_time: NOW + 24.hours(), user: user.clone() };
    assert_eq!(
        store.one_time_token(confirmation.id).await.expect("the store"),
        Some(token),
        "the token is returned with the account as it is now"
    );

    assert_eq!((notice.id, notice.kind), (change.notice.id, MailKind::EmailChangeRequested));
    assert_eq!(notice.recipient, address("ada@example.com"));
    assert_eq!((notice.new_email, notice.grant), (Some(address("new@example.com")), None));
}

/// Asserts the outcome of a request, and that it changes nothing.
async fn assert_unchanged(database: &Database, store: &dyn Store, change: EmailChange, outcome: EmailChangeRequest) {
    let before = database.everything().await;
    assert_eq!(request(store, change).await, outcome);
    assert_eq!(database.everything().await, before);
}

async fn a_request_for_a_taken_address_is_refused(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    sign_up_without_mail(database, store.as_ref(), "grace").await;
    let change = email_change(&user, "grace@example.com");
    assert_unchanged(database, store.as_ref(), change, EmailChangeRequest::EmailTaken).await;
}

fn concealed_change(user: &User, new: &str) -> EmailChange {
    EmailChange { owner_notice: Some(mail(MailKind::AccountExists, new, None)), ..email_change(user, new) }
}

async fn a_concealed_request_mails_the_owner_of_the_address_instead(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let owner = sign_up_without_mail(database, store.as_ref(), "grace").await;
    let change = concealed_change(&user, "grace@example.com");
    assert_eq!(request(store.as_ref(), change.clone()).await, EmailChangeRequest::Requested);

    let [owner_notice, notice] = deliver_both(store.as_ref()).await;
    assert_eq!(Some(owner_notice.id), change.owner_notice.map(|mail| mail.id));
    assert_eq!((owner_notice.kind, owner_notice.recipient), (MailKind::AccountExists, owner.email));
    assert_eq!(owner_notice.grant, None);
    assert_eq!(
        (notice.kind, notice.recipient),
        (MailKind::EmailChangeRequested, user.email),
        "the notice is the same as for a free address"
    );
    assert_eq!(database.tokens().await, Vec::<String>::new());
}

async fn a_request_over_the_limit_of_the_new_address_queues_no_mail(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let limit = AddressLimit { burst: 1, ..LIMIT };
    let change = |new| EmailChange { limit, ..email_change(&user, new) };
    assert_eq!(request(store.as_ref(), change("new@example.com")).await, EmailChangeRequest::Requested);
    assert_unchanged(database, store.as_ref(), change("new@example.com"), EmailChangeRequest::OverLimit).await;
    assert_eq!(request(store.as_ref(), change("newer@example.com")).await, EmailChangeRequest::Requested);
}

async fn a_request_counts_only_against_the_limit_of_the_new_address(database: &Database) {
    let store = database.store().await;
    // The sign-up has used up the limit of the current address. Its notice is sent all the same.
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let limit = AddressLimit { burst: 1, ..LIMIT };
    let before = database.sql.number("SELECT count(*) FROM mail_limits").await;
    let change = EmailChange { limit, ..email_change(&user, "new@example.com") };
    assert_eq!(request(store.as_ref(), change).await, EmailChangeRequest::Requested);
    let notice_and_token = ["confirm_email_change to new@example.com", "email_change_requested to ada@example.com"];
    assert_eq!(database.outbox().await, notice_and_token);
    assert_eq!(database.sql.number("SELECT count(*) FROM mail_limits").await, before + 1);
}

async fn a_concealed_request_over_the_limit_queues_no_mail(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    sign_up_without_mail(database, store.as_ref(), "grace").await;
    let limit = AddressLimit { burst: 1, ..LIMIT };
    let change = EmailChange { limit, ..concealed_change(&user, "grace@example.com") };
    assert_unchanged(database, store.as_ref(), change, EmailChangeRequest::OverLimit).await;
    // Without concealment the caller learns that the address is taken.
    let change = EmailChange { limit, ..email_change(&user, "grace@example.com") };
    assert_unchanged(database, store.as_ref(), change, EmailChangeRequest::EmailTaken).await;
}

async fn a_request_is_refused_if_the_password_has_changed_since_it_was_verified(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    sign_up_without_mail(database, store.as_ref(), "grace").await;
    let unknown = User { id: UserId(new_id()), ..user.clone() };
    for (change, account) in
        [("password_version = 1", &user), ("disabled = true", &user), ("disabled = false", &unknown)]
    {
        database.set_user(user.id, "password_version = 0, disabled = false").await;
        database.set_user(user.id, change).await;
        for new in ["new@example.com", "grace@example.com"] {
            for change in [email_change(account, new), concealed_change(account, new)] {
                assert_unchanged(database, store.as_ref(), change, EmailChangeRequest::Refused).await;
            }
        }
    }
}

async fn confirm(store: &dyn Store, confirmation: EmailConfirmation) -> EmailConfirmationOutcome {
    store.confirm_email_change(confirmation).await.expect("the store")
}

async fn a_confirmation_changes_the_address_and_verifies_it(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let other = sign_up_without_mail(database, store.as_ref(), "grace").await;
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
    assert_eq!(store.credentials(&user.email).await.expect("the store"), None, "the old address is free");
    let unchanged = store.credentials(&other.email).await.expect("the store").expect("an account");
    assert_eq!(unchanged.user, other);
    assert!(!database.is_revoked(&session).await, "the password has not changed, so the session goes on");
}

async fn a_confirmation_mails_a_notice_to_the_old_address(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let token = token(store.as_ref(), &user, Purpose::ChangeEmail).await;
    let confirmation = EmailConfirmation { context: audit_context_at(NOW - 1.minutes()), ..confirmation_by(token) };
    let outcome = confirm(store.as_ref(), confirmation.clone()).await;
    assert!(matches!(outcome, EmailConfirmationOutcome::Changed(_)), "{outcome:?}");
    let [notice] = deliver(store.as_ref()).await.try_into().expect("one mail");
    assert_eq!((notice.id, notice.kind), (confirmation.notice, MailKind::EmailChanged));
    assert_eq!(notice.recipient, user.email);
    assert_eq!((notice.new_email, notice.grant), (Some(address("new-ada@example.com")), None));
    assert_eq!(notice.create_time, confirmation.context.now);
}

async fn a_confirmation_voids_all_tokens_of_its_user_and_the_mails_that_carry_tokens(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let other = sign_up_without_mail(database, store.as_ref(), "grace").await;
    for account in [&user, &other] {
        for purpose in [Purpose::VerifyEmail, Purpose::ResetPassword] {
            token(store.as_ref(), account, purpose).await;
        }
    }
    let change = token(store.as_ref(), &user, Purpose::ChangeEmail).await;
    for account in [&user, &other] {
        for purpose in Purpose::ALL {
            queue_mail(store.as_ref(), &mail_with_token(account, purpose)).await;
        }
        for purpose in [Purpose::VerifyEmail, Purpose::ResetPassword] {
            queue_mail(store.as_ref(), &NewMail { user_id: None, ..mail_with_token(account, purpose) }).await;
        }
        queue_mail(store.as_ref(), &mail(MailKind::PasswordChanged, account.email.as_str(), Some(account.id))).await;
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

async fn a_confirmation_of_a_meanwhile_taken_address_keeps_the_token_and_changes_nothing(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let token = token(store.as_ref(), &user, Purpose::ChangeEmail).await;
    queue_mail(store.as_ref(), &mail_with_token(&user, Purpose::ResetPassword)).await;
    let other = sign_up_without_mail(database, store.as_ref(), "new-ada").await;
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

async fn a_disabled_account_cannot_confirm_a_new_address(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
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
