//! A mail on its way: claimed for a while, sent, tried again or given up; and which of them are not called for any
//! more.

use std::time::Duration;

use postern::domain::{
    account::User,
    mail::{MailKind, NewMail},
    one_time::{OneTimeGrant, Purpose},
    ports::{ClaimedMail, MailClaim, MailQueue, MailRetry, Store},
};
use time::ext::NumericalDuration as _;

use crate::{
    fixtures::{
        LEASE, NO_LIMIT, NOW, address, claim, claimed, deliver, mail, mail_with_token, post, sign_up, sign_up_quietly,
        token,
    },
    support::{Database, Engine, on_each_engine},
};

on_each_engine![
    mails_are_claimed_in_the_order_in_which_they_fell_due,
    a_claimed_mail_says_what_it_needs_to_be_written,
    a_claimed_mail_is_nobody_elses_until_its_lease_ends,
    a_claim_that_was_taken_over_settles_nothing,
    a_mail_that_was_sent_is_gone,
    a_mail_that_failed_is_due_again_when_it_was_said,
    a_mail_that_was_given_up_is_never_claimed_and_is_counted,
    a_mail_that_makes_no_sense_holds_up_no_other,
    a_mail_to_an_address_that_nobody_has_is_dropped,
    a_verification_of_what_is_verified_is_dropped,
    a_disabled_account_is_mailed_no_token_to_change_it_by,
    a_mail_whose_token_would_have_expired_is_dropped,
    a_token_is_not_mailed_to_an_address_that_the_account_no_longer_has,
    a_change_to_the_address_that_the_account_has_is_dropped,
    a_notice_is_sent_whatever_became_of_its_account,
    only_what_is_old_is_forgotten,
    an_account_that_is_deleted_takes_its_tokens_and_mails_along,
];

async fn assert_dropped(database: &Database, store: &dyn Store, kind: MailKind) {
    let tokens = database.tokens().await;
    assert_eq!(claim(store).await, MailClaim::Dropped(kind));
    assert_eq!(claim(store).await, MailClaim::NoneDue, "it is gone");
    assert_eq!(database.outbox().await, Vec::<String>::new(), "it is gone");
    assert_eq!(database.tokens().await, tokens, "and made no token");
}

async fn mails_are_claimed_in_the_order_in_which_they_fell_due(database: &Database) {
    let store = database.store().await;
    sign_up_quietly(database, store.as_ref(), "ada").await;
    // Neither by id nor by when they were written.
    let mails: Vec<_> = (0..4).map(|_| mail(MailKind::AccountExists, "ada@example.com", None)).collect();
    for number in [2, 0, 3, 1] {
        post(store.as_ref(), &mails[number]).await;
    }
    for (number, hours) in [(3, 1), (1, 4), (0, 2), (2, 3)] {
        let due = match database.engine {
            Engine::Sqlite => format!("next_attempt_time - {hours} * 3600000000"),
            Engine::Postgres => format!("next_attempt_time - interval '{hours} hours'"),
        };
        let id = database.id(mails[number].id.0);
        database.sql.execute(&format!("UPDATE mail_outbox SET next_attempt_time = {due} WHERE id = {id}")).await;
    }
    for number in [1, 2, 0, 3] {
        assert_eq!(claimed(store.as_ref()).await.id, mails[number].id, "mail {number}");
    }
    assert_eq!(claim(store.as_ref()).await, MailClaim::NoneDue);
}

async fn a_claimed_mail_says_what_it_needs_to_be_written(database: &Database) {
    let store = database.store().await;
    let user = sign_up_quietly(database, store.as_ref(), "ada").await;
    for kind in MailKind::ALL {
        let recipient = if kind == MailKind::ConfirmEmailChange { "new@example.com" } else { "ada@example.com" };
        for (user_id, new_email) in [(Some(user.id), Some(address("new@example.com"))), (None, None)] {
            if user_id.is_none() && kind == MailKind::ConfirmEmailChange {
                continue;
            }
            let mail = NewMail { new_email, ..mail(kind, recipient, user_id) };
            post(store.as_ref(), &mail).await;
            let grant = kind.purpose().map(|purpose| OneTimeGrant {
                id: mail.id,
                purpose,
                user_id: user.id,
                email: address(recipient),
            });
            let expected = ClaimedMail {
                id: mail.id,
                kind,
                recipient: mail.recipient,
                username: user.username.clone(),
                new_email: mail.new_email,
                grant,
                attempt: 1,
                create_time: NOW,
            };
            assert_eq!(claimed(store.as_ref()).await, expected);
            assert!(store.mail_sent(mail.id, 1).await.expect("the store"));
        }
    }
}

async fn a_claimed_mail_is_nobody_elses_until_its_lease_ends(database: &Database) {
    let store = database.store().await;
    sign_up(store.as_ref(), "ada").await;
    let first = claimed(store.as_ref()).await;
    assert_eq!(first.attempt, 1);
    assert_eq!(claim(store.as_ref()).await, MailClaim::NoneDue);
    database.age_mails(Duration::from_mins(59)).await;
    assert_eq!(claim(store.as_ref()).await, MailClaim::NoneDue);
    database.age_mails(Duration::from_mins(1)).await;
    let second = claimed(store.as_ref()).await;
    assert_eq!(second, ClaimedMail { attempt: 2, ..first });
    assert_eq!(claim(store.as_ref()).await, MailClaim::NoneDue, "the lease begins anew");
}

async fn fail(store: &dyn Store, mail: &ClaimedMail, retry: MailRetry) -> bool {
    store.mail_failed(mail.id, mail.attempt, retry, NOW).await.expect("the store")
}

async fn a_claim_that_was_taken_over_settles_nothing(database: &Database) {
    let store = database.store().await;
    sign_up(store.as_ref(), "ada").await;
    let first = claimed(store.as_ref()).await;
    database.age_mails(LEASE).await;
    let second = claimed(store.as_ref()).await;

    let before = database.everything().await;
    assert!(!store.mail_sent(first.id, first.attempt).await.expect("the store"));
    assert!(!fail(store.as_ref(), &first, MailRetry::After(Duration::ZERO)).await);
    assert!(!fail(store.as_ref(), &first, MailRetry::Never).await);
    assert_eq!(database.everything().await, before);
    assert!(store.mail_sent(second.id, second.attempt).await.expect("the store"));
}

async fn a_mail_that_was_sent_is_gone(database: &Database) {
    let store = database.store().await;
    sign_up(store.as_ref(), "ada").await;
    let mail = claimed(store.as_ref()).await;
    sign_up(store.as_ref(), "grace").await;
    assert!(store.mail_sent(mail.id, mail.attempt).await.expect("the store"));
    assert_eq!(database.outbox().await, ["verify_email to grace@example.com"]);
    assert!(!store.mail_sent(mail.id, mail.attempt).await.expect("the store"), "a second time");
    assert!(!fail(store.as_ref(), &mail, MailRetry::Never).await, "nor did it fail");
    database.age_mails(LEASE).await;
    assert_eq!(claimed(store.as_ref()).await.recipient, address("grace@example.com"));
    assert_eq!(claim(store.as_ref()).await, MailClaim::NoneDue);
}

async fn a_mail_that_failed_is_due_again_when_it_was_said(database: &Database) {
    let store = database.store().await;
    sign_up(store.as_ref(), "ada").await;
    for (attempt, minutes) in [(1, 10), (2, 90)] {
        let mail = claimed(store.as_ref()).await;
        assert_eq!(mail.attempt, attempt);
        // Sooner than its lease would have ended, or later.
        assert!(fail(store.as_ref(), &mail, MailRetry::After(Duration::from_mins(minutes))).await);
        database.age_mails(Duration::from_mins(minutes - 1)).await;
        assert_eq!(claim(store.as_ref()).await, MailClaim::NoneDue);
        database.age_mails(Duration::from_mins(1)).await;
    }
    assert_eq!(claimed(store.as_ref()).await.attempt, 3);
}

async fn a_mail_that_was_given_up_is_never_claimed_and_is_counted(database: &Database) {
    let store = database.store().await;
    assert_eq!(store.mail_queue().await.expect("the store"), MailQueue { waiting: 0, dead: 0 });
    for name in ["ada", "grace", "linus"] {
        sign_up(store.as_ref(), name).await;
    }
    let mail = claimed(store.as_ref()).await;
    assert_eq!(store.mail_queue().await.expect("the store"), MailQueue { waiting: 3, dead: 0 });
    assert!(fail(store.as_ref(), &mail, MailRetry::Never).await);
    assert_eq!(store.mail_queue().await.expect("the store"), MailQueue { waiting: 2, dead: 1 });

    let before = database.everything().await;
    assert!(!fail(store.as_ref(), &mail, MailRetry::After(Duration::ZERO)).await, "it stays dead");
    let later = store.mail_failed(mail.id, mail.attempt, MailRetry::Never, NOW + 1.hours()).await;
    assert!(!later.expect("the store"), "and died when it did");
    assert_eq!(database.everything().await, before);

    assert_eq!(deliver(store.as_ref()).await.len(), 2);
    database.age_mails(Duration::from_hours(24 * 365)).await;
    assert_eq!(claim(store.as_ref()).await, MailClaim::NoneDue);
    assert_eq!(database.outbox().await.len(), 1, "it is kept for a person to look at");
}

/// Of a release to come, or meddled with.
async fn a_mail_that_makes_no_sense_holds_up_no_other(database: &Database) {
    let store = database.store().await;
    sign_up(store.as_ref(), "ada").await;
    database.sql.execute("UPDATE mail_outbox SET kind = 'of a release to come'").await;
    sign_up(store.as_ref(), "grace").await;
    database.sql.execute("UPDATE mail_outbox SET recipient = 'no address' WHERE kind = 'verify_email'").await;
    sign_up(store.as_ref(), "linus").await;
    for _ in 0..2 {
        store.claim_mail(NOW, LEASE).await.expect_err("a mail that makes no sense");
    }
    assert_eq!(claimed(store.as_ref()).await.recipient, address("linus@example.com"));
    assert_eq!(claim(store.as_ref()).await, MailClaim::NoneDue, "they are leased like any other");
}

async fn a_mail_to_an_address_that_nobody_has_is_dropped(database: &Database) {
    let store = database.store().await;
    sign_up_quietly(database, store.as_ref(), "ada").await;
    for kind in [MailKind::VerifyEmail, MailKind::ResetPassword, MailKind::AccountExists] {
        post(store.as_ref(), &mail(kind, "nobody@example.com", None)).await;
        assert_dropped(database, store.as_ref(), kind).await;
    }
}

async fn a_verification_of_what_is_verified_is_dropped(database: &Database) {
    let store = database.store().await;
    let user = sign_up_quietly(database, store.as_ref(), "ada").await;
    database.set_user(user.id, "email_verified = true").await;
    for user_id in [Some(user.id), None] {
        post(store.as_ref(), &mail(MailKind::VerifyEmail, "ada@example.com", user_id)).await;
        assert_dropped(database, store.as_ref(), MailKind::VerifyEmail).await;
    }
}

async fn a_disabled_account_is_mailed_no_token_to_change_it_by(database: &Database) {
    let store = database.store().await;
    let user = sign_up_quietly(database, store.as_ref(), "ada").await;
    database.set_user(user.id, "disabled = true").await;
    for purpose in [Purpose::ResetPassword, Purpose::ChangeEmail] {
        post(store.as_ref(), &mail_with_token(&user, purpose)).await;
        assert_dropped(database, store.as_ref(), MailKind::carrying(purpose)).await;
    }
    post(store.as_ref(), &mail(MailKind::ResetPassword, "ada@example.com", None)).await;
    assert_dropped(database, store.as_ref(), MailKind::ResetPassword).await;
}

async fn a_mail_whose_token_would_have_expired_is_dropped(database: &Database) {
    let store = database.store().await;
    let user = sign_up_quietly(database, store.as_ref(), "ada").await;
    let lifetimes = [
        (Purpose::VerifyEmail, 24.hours()),
        (Purpose::ResetPassword, 30.minutes()),
        (Purpose::ChangeEmail, 24.hours()),
    ];
    for (purpose, lifetime) in lifetimes {
        let mail = mail_with_token(&user, purpose);
        post(store.as_ref(), &mail).await;
        let in_time = NOW + lifetime - 1.microseconds();
        let claim = store.claim_mail(in_time, Duration::ZERO).await.expect("the store");
        assert!(matches!(claim, MailClaim::Claimed(_)), "{claim:?}");
        let claim = store.claim_mail(NOW + lifetime, LEASE).await.expect("the store");
        assert_eq!(claim, MailClaim::Dropped(MailKind::carrying(purpose)), "the second time, it is too late");
        assert_eq!(database.outbox().await, Vec::<String>::new());
    }
}

async fn a_token_is_not_mailed_to_an_address_that_the_account_no_longer_has(database: &Database) {
    let store = database.store().await;
    let user = sign_up_quietly(database, store.as_ref(), "ada").await;
    database.set_user(user.id, "email = 'lovelace@example.com'").await;
    for kind in [MailKind::VerifyEmail, MailKind::ResetPassword] {
        for user_id in [Some(user.id), None] {
            post(store.as_ref(), &mail(kind, "ada@example.com", user_id)).await;
            assert_dropped(database, store.as_ref(), kind).await;
        }
    }
}

async fn a_change_to_the_address_that_the_account_has_is_dropped(database: &Database) {
    let store = database.store().await;
    let user = sign_up_quietly(database, store.as_ref(), "ada").await;
    post(store.as_ref(), &mail(MailKind::ConfirmEmailChange, "ada@example.com", Some(user.id))).await;
    assert_dropped(database, store.as_ref(), MailKind::ConfirmEmailChange).await;
}

async fn a_notice_is_sent_whatever_became_of_its_account(database: &Database) {
    let store = database.store().await;
    let user = sign_up_quietly(database, store.as_ref(), "ada").await;
    let kinds = [MailKind::EmailChangeRequested, MailKind::EmailChanged, MailKind::PasswordChanged];
    for kind in kinds {
        post(store.as_ref(), &mail(kind, "ada@example.com", Some(user.id))).await;
    }
    database.set_user(user.id, "email = 'lovelace@example.com', email_verified = true, disabled = true").await;
    for kind in kinds {
        let claim = store.claim_mail(NOW + 365.days(), LEASE).await.expect("the store");
        let MailClaim::Claimed(mail) = claim else { panic!("{kind:?}: {claim:?}") };
        assert_eq!((mail.kind, mail.recipient), (kind, address("ada@example.com")), "to the address before");
    }
}

async fn gives_up(store: &dyn Store, user: &User, days: i64) {
    post(store, &mail(MailKind::AccountExists, user.email.as_str(), None)).await;
    let mail = claimed(store).await;
    let time = NOW + days.days();
    assert!(store.mail_failed(mail.id, mail.attempt, MailRetry::Never, time).await.expect("the store"));
}

async fn only_what_is_old_is_forgotten(database: &Database) {
    let store = database.store().await;
    let user = sign_up_quietly(database, store.as_ref(), "ada").await;
    for purpose in Purpose::ALL {
        token(store.as_ref(), &user, purpose).await;
    }
    gives_up(store.as_ref(), &user, 1).await;
    gives_up(store.as_ref(), &user, 2).await;
    post(store.as_ref(), &mail(MailKind::AccountExists, "ada@example.com", None)).await;
    database.sql.execute("DELETE FROM mail_limits").await;
    post(store.as_ref(), &mail(MailKind::ResetPassword, "nobody@example.com", None)).await;
    let spent = NOW + NO_LIMIT.interval;

    let forget = async |now, dead_before| {
        store.purge_mail(now, dead_before).await.expect("the store");
        let limits = database.sql.number("SELECT count(*) FROM mail_limits").await;
        let dead = store.mail_queue().await.expect("the store").dead;
        (database.tokens().await.len(), limits, dead)
    };
    let tick = 1.microseconds();
    assert_eq!(forget(spent, NOW + 1.days()).await, (3, 1, 2), "nothing is old");
    assert_eq!(forget(spent + tick, NOW + 1.days() + tick).await, (3, 0, 1));
    assert_eq!(forget(NOW + 30.minutes(), NOW).await, (3, 0, 1));
    assert_eq!(forget(NOW + 30.minutes() + tick, NOW).await, (2, 0, 1), "the reset token");
    assert_eq!(forget(NOW + 24.hours(), NOW + 2.days()).await, (2, 0, 1));
    assert_eq!(forget(NOW + 24.hours() + tick, NOW + 2.days() + tick).await, (0, 0, 0));
    assert_eq!(forget(NOW + 365.days(), NOW + 365.days()).await, (0, 0, 0));
    let waiting = ["account_exists to ada@example.com", "reset_password to nobody@example.com"];
    assert_eq!(database.outbox().await, waiting, "however long it waits");
}

async fn an_account_that_is_deleted_takes_its_tokens_and_mails_along(database: &Database) {
    let store = database.store().await;
    for name in ["ada", "grace"] {
        let user = sign_up_quietly(database, store.as_ref(), name).await;
        for purpose in Purpose::ALL {
            token(store.as_ref(), &user, purpose).await;
        }
        for purpose in Purpose::ALL {
            post(store.as_ref(), &mail_with_token(&user, purpose)).await;
        }
        post(store.as_ref(), &mail(MailKind::PasswordChanged, user.email.as_str(), Some(user.id))).await;
    }
    let user = store.credentials(&address("ada@example.com")).await.expect("the store").expect("an account").user;
    database.delete_user(user.id).await;
    let of_grace = |lines: Vec<String>| lines.iter().all(|line| line.ends_with("grace@example.com"));
    assert_eq!(database.outbox().await.len(), 4);
    assert!(of_grace(database.outbox().await));
    assert_eq!(database.tokens().await.len(), 3);
    assert!(of_grace(database.tokens().await));
}
