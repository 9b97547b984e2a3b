//! Changing the address of an account: the request, and the confirmation by the token in the mail to the new address.

use std::sync::Arc;

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
        LIMIT, NOW, address, audit, audit_context, audit_context_at, confirmation_by, deliver, email_change, is_alive,
        log_in, mail, mail_with_token, new_id, queue_mail, sign_up_admin, sign_up_without_mail, token, verification,
    },
    parallel::{all_at_once, replicas, stagger},
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
    a_request_for_an_address_that_nobody_has_verified_is_as_for_a_free_one,
    a_confirmation_deletes_the_account_that_never_verified_the_address,
    an_account_that_an_operator_has_touched_keeps_its_address,
    of_two_accounts_that_confirm_the_address_of_each_other_one_is_left,
    of_a_verification_and_a_confirmation_of_one_address_one_succeeds,
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
    let owner = sign_up_without_mail(database, store.as_ref(), "grace").await;
    database.set_user(owner.id, "email_verified = true").await;
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
    database.set_user(owner.id, "email_verified = true").await;
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
    let owner = sign_up_without_mail(database, store.as_ref(), "grace").await;
    database.set_user(owner.id, "email_verified = true").await;
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
    database.set_user(other.id, "email_verified = true").await;
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

async fn a_request_for_an_address_that_nobody_has_verified_is_as_for_a_free_one(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    sign_up_without_mail(database, store.as_ref(), "grace").await;
    for change in [email_change(&user, "grace@example.com"), concealed_change(&user, "grace@example.com")] {
        assert_eq!(request(store.as_ref(), change).await, EmailChangeRequest::Requested);
        let [confirmation, _] = deliver_both(store.as_ref()).await;
        let expected = (MailKind::ConfirmEmailChange, address("grace@example.com"));
        assert_eq!((confirmation.kind, confirmation.recipient), expected);
        assert_eq!(confirmation.grant.map(|grant| grant.user_id), Some(user.id));
    }
}

/// A live token for a change to the address of another account.
async fn token_for(database: &Database, store: &dyn Store, user: &User, holder: &User) -> OneTimeGrant {
    let mail = mail(MailKind::ConfirmEmailChange, holder.email.as_str(), Some(user.id));
    database.sql.execute("DELETE FROM mail_outbox").await;
    queue_mail(store, &mail).await;
    let [sent] = deliver(store).await.try_into().expect("one mail");
    sent.grant.expect("a token")
}

async fn a_confirmation_deletes_the_account_that_never_verified_the_address(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let user = sign_up_without_mail(database, store, "ada").await;
    let squatter = sign_up_without_mail(database, store, "grace").await;
    let [own, session] = [log_in(store, &user).await, log_in(store, &squatter).await];
    for purpose in Purpose::ALL {
        token(store, &squatter, purpose).await;
    }
    let change = token_for(database, store, &user, &squatter).await;
    queue_mail(store, &mail_with_token(&squatter, Purpose::VerifyEmail)).await;
    let reset = mail(MailKind::ResetPassword, squatter.email.as_str(), None);
    queue_mail(store, &reset).await;

    let confirmation = confirmation_by(change);
    let contexts = [confirmation.context, confirmation.eviction];
    let outcome = confirm(store, confirmation).await;

    let EmailConfirmationOutcome::Changed(changed) = outcome else { panic!("{outcome:?}") };
    assert_eq!((changed.id, &changed.email, changed.email_verified), (user.id, &squatter.email, true));
    assert_eq!(store.user(squatter.id).await.expect("the store"), None);
    assert_eq!(database.tokens().await, Vec::<String>::new());
    assert_eq!(database.outbox().await, ["email_changed to ada@example.com"]);
    assert!(!is_alive(store, &session).await && is_alive(store, &own).await);
    // Access tokens of the deleted account are refused, by its session and by its id.
    let id = database.id(squatter.id.0);
    let logged = format!("SELECT count(*) FROM revocations WHERE user_id = {id} AND roles = ''");
    assert_eq!((database.revocations().await, database.sql.number(&logged).await), (1, 1));
    let events: Vec<_> =
        audit(store).await.into_iter().filter(|row| contexts.iter().any(|c| c.event == row.id)).collect();
    for event in &events {
        assert_eq!(event.actor, Some(user.id.into()));
    }
    let mut events: Vec<_> = events.into_iter().map(|event| (event.action, event.user)).collect();
    events.sort();
    assert_eq!(events, [("email_changed".to_owned(), Some(user.id)), ("user_deleted".to_owned(), Some(squatter.id))]);
}

async fn an_account_that_an_operator_has_touched_keeps_its_address(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let user = sign_up_without_mail(database, store, "ada").await;
    let admin = sign_up_admin(database, store, "grace").await;
    let disabled = sign_up_without_mail(database, store, "joan").await;
    database.set_user(disabled.id, "disabled = true").await;
    for holder in [&admin, &disabled] {
        let token = token_for(database, store, &user, holder).await;
        let before = database.everything().await;
        assert_eq!(confirm(store, confirmation_by(token)).await, EmailConfirmationOutcome::EmailTaken);
        assert_eq!(database.everything().await, before);
        let change = email_change(&user, holder.email.as_str());
        assert_unchanged(database, store, change, EmailChangeRequest::EmailTaken).await;
    }
}

async fn of_two_accounts_that_confirm_the_address_of_each_other_one_is_left(database: &Database) {
    let stores = replicas(database).await;
    for round in 0..10 {
        let mut users = Vec::new();
        for name in ["ada", "grace"] {
            users.push(sign_up_without_mail(database, stores[0].as_ref(), &format!("{name}-{round}")).await);
        }
        let mut tokens = Vec::new();
        for (user, holder) in [(0, 1), (1, 0)] {
            tokens.push(token_for(database, stores[0].as_ref(), &users[user], &users[holder]).await);
        }
        let steps = tokens.into_iter().zip(&stores).map(|(token, store)| {
            let store = Arc::clone(store);
            // A deadlock would be an error of the store.
            async move { store.confirm_email_change(confirmation_by(token)).await.expect("the store") }
        });
        let outcomes = all_at_once(steps).await;
        let changed = outcomes.iter().filter(|outcome| matches!(outcome, EmailConfirmationOutcome::Changed(_))).count();
        let dead = outcomes.iter().filter(|outcome| **outcome == EmailConfirmationOutcome::TokenDead).count();
        assert_eq!((changed, dead), (1, 1), "round {round}: {outcomes:?}");
        let left = format!("SELECT count(*) FROM users WHERE username LIKE '%-{round}'");
        assert_eq!(database.sql.number(&left).await, 1);
    }
}

async fn of_a_verification_and_a_confirmation_of_one_address_one_succeeds(database: &Database) {
    let stores = replicas(database).await;
    for round in 0..10 {
        let user = sign_up_without_mail(database, stores[0].as_ref(), &format!("ada-{round}")).await;
        let holder = sign_up_without_mail(database, stores[0].as_ref(), &format!("grace-{round}")).await;
        let verify = token(stores[0].as_ref(), &holder, Purpose::VerifyEmail).await;
        let change = token_for(database, stores[0].as_ref(), &user, &holder).await;
        let verifying = tokio::spawn({
            let store = Arc::clone(&stores[0]);
            async move { store.verify_email(verification(verify, audit_context())).await.expect("the store") }
        });
        stagger(round % 5).await;
        let outcome = confirm(stores[1].as_ref(), confirmation_by(change)).await;
        let verified = verifying.await.expect("the task did not panic").is_some();
        let left = stores[0].user(holder.id).await.expect("the store");
        match outcome {
            EmailConfirmationOutcome::Changed(_) => assert!(!verified && left.is_none(), "round {round}"),
            EmailConfirmationOutcome::EmailTaken => assert!(verified && left.is_some(), "round {round}"),
            EmailConfirmationOutcome::TokenDead => panic!("round {round}: the token was live"),
        }
    }
}
