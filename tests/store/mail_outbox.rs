//! The outbox: mails are claimed for a limited time, sent, retried or given up; and obsolete mails are dropped.

use std::time::Duration;

use postern::{
    domain::{
        account::User,
        mail::{MailKind, NewMail},
        one_time::{OneTimeGrant, Purpose},
        ports::{ClaimedMail, MailClaim, MailQueue, MailRetry, Store},
    },
    trace::TraceParent,
};
use time::ext::NumericalDuration as _;

use crate::{
    fixtures::{
        LEASE, NO_LIMIT, NOW, address, claim, claimed, deliver, mail, mail_with_token, queue_mail, sign_up,
        sign_up_without_mail, token,
    },
    support::{Database, Engine, on_each_engine},
};

on_each_engine![
    mails_are_claimed_in_the_order_in_which_they_are_due,
    a_claimed_mail_contains_everything_that_its_text_needs,
    a_claimed_mail_cannot_be_claimed_again_until_its_lease_ends,
    a_lapsed_claim_settles_nothing,
    a_sent_mail_is_deleted,
    a_failed_mail_is_due_again_after_its_retry_delay,
    a_dead_mail_is_never_claimed_and_is_counted,
    a_mail_that_cannot_be_read_does_not_block_the_others,
    a_mail_to_an_address_without_an_account_is_dropped,
    a_verification_mail_to_a_verified_address_is_dropped,
    a_disabled_account_is_sent_no_reset_or_email_change_token,
    a_mail_whose_token_would_be_expired_is_dropped,
    a_token_is_not_mailed_to_a_former_address_of_the_account,
    a_change_to_the_current_address_is_dropped,
    a_notice_is_sent_even_if_its_account_has_changed,
    only_expired_tokens_idle_limits_and_old_dead_mails_are_purged,
    deleting_an_account_deletes_its_tokens_and_mails,
];

async fn assert_dropped(database: &Database, store: &dyn Store, kind: MailKind) {
    let tokens = database.tokens().await;
    assert_eq!(claim(store).await, MailClaim::Dropped(kind));
    assert_eq!(claim(store).await, MailClaim::NoneDue, "the dropped mail is deleted");
    assert_eq!(database.outbox().await, Vec::<String>::new(), "the dropped mail is deleted");
    assert_eq!(database.tokens().await, tokens, "a dropped mail stores no token");
}

async fn mails_are_claimed_in_the_order_in_which_they_are_due(database: &Database) {
    let store = database.store().await;
    sign_up_without_mail(database, store.as_ref(), "ada").await;
    // The order is neither that of the ids nor that of insertion.
    let mails: Vec<_> = (0..4).map(|_| mail(MailKind::AccountExists, "ada@example.com", None)).collect();
    for number in [2, 0, 3, 1] {
        queue_mail(store.as_ref(), &mails[number]).await;
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

async fn a_claimed_mail_contains_everything_that_its_text_needs(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    for kind in MailKind::ALL {
        let recipient = if kind == MailKind::ConfirmEmailChange { "new@example.com" } else { "ada@example.com" };
        for (user_id, new_email) in [(Some(user.id), Some(address("new@example.com"))), (None, None)] {
            if user_id.is_none() && kind == MailKind::ConfirmEmailChange {
                continue;
            }
            let trace = Some(TraceParent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned()));
            let mail = NewMail { new_email, trace, ..mail(kind, recipient, user_id) };
            queue_mail(store.as_ref(), &mail).await;
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
                new_email: mail.new_email,
                grant,
                attempt: 1,
                create_time: NOW,
                trace: mail.trace,
            };
            assert_eq!(claimed(store.as_ref()).await, expected);
            assert!(store.mail_sent(mail.id, 1).await.expect("the store"));
        }
    }
}

async fn a_claimed_mail_cannot_be_claimed_again_until_its_lease_ends(database: &Database) {
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
    assert_eq!(claim(store.as_ref()).await, MailClaim::NoneDue, "the second claim has its own lease");
}

async fn settle_as_failed(store: &dyn Store, mail: &ClaimedMail, retry: MailRetry) -> bool {
    store.mail_failed(mail.id, mail.attempt, retry, NOW).await.expect("the store")
}

async fn a_lapsed_claim_settles_nothing(database: &Database) {
    let store = database.store().await;
    sign_up(store.as_ref(), "ada").await;
    let first = claimed(store.as_ref()).await;
    database.age_mails(LEASE).await;
    let second = claimed(store.as_ref()).await;

    let before = database.everything().await;
    assert!(!store.mail_sent(first.id, first.attempt).await.expect("the store"));
    assert!(!settle_as_failed(store.as_ref(), &first, MailRetry::After(Duration::ZERO)).await);
    assert!(!settle_as_failed(store.as_ref(), &first, MailRetry::Never).await);
    assert_eq!(database.everything().await, before);
    assert!(store.mail_sent(second.id, second.attempt).await.expect("the store"));
}

async fn a_sent_mail_is_deleted(database: &Database) {
    let store = database.store().await;
    sign_up(store.as_ref(), "ada").await;
    let mail = claimed(store.as_ref()).await;
    sign_up(store.as_ref(), "grace").await;
    assert!(store.mail_sent(mail.id, mail.attempt).await.expect("the store"));
    assert_eq!(database.outbox().await, ["verify_email to grace@example.com"]);
    assert!(!store.mail_sent(mail.id, mail.attempt).await.expect("the store"), "the mail was settled before");
    assert!(!settle_as_failed(store.as_ref(), &mail, MailRetry::Never).await, "a sent mail cannot fail");
    database.age_mails(LEASE).await;
    assert_eq!(claimed(store.as_ref()).await.recipient, address("grace@example.com"));
    assert_eq!(claim(store.as_ref()).await, MailClaim::NoneDue);
}

async fn a_failed_mail_is_due_again_after_its_retry_delay(database: &Database) {
    let store = database.store().await;
    sign_up(store.as_ref(), "ada").await;
    for (attempt, minutes) in [(1, 10), (2, 90)] {
        let mail = claimed(store.as_ref()).await;
        assert_eq!(mail.attempt, attempt);
        // The delay is once shorter and once longer than the lease.
        assert!(settle_as_failed(store.as_ref(), &mail, MailRetry::After(Duration::from_mins(minutes))).await);
        database.age_mails(Duration::from_mins(minutes - 1)).await;
        assert_eq!(claim(store.as_ref()).await, MailClaim::NoneDue);
        database.age_mails(Duration::from_mins(1)).await;
    }
    assert_eq!(claimed(store.as_ref()).await.attempt, 3);
}

async fn a_dead_mail_is_never_claimed_and_is_counted(database: &Database) {
    let store = database.store().await;
    assert_eq!(store.mail_queue().await.expect("the store"), MailQueue { waiting: 0, dead: 0 });
    for name in ["ada", "grace", "linus"] {
        sign_up(store.as_ref(), name).await;
    }
    let mail = claimed(store.as_ref()).await;
    assert_eq!(store.mail_queue().await.expect("the store"), MailQueue { waiting: 3, dead: 0 });
    assert!(settle_as_failed(store.as_ref(), &mail, MailRetry::Never).await);
    assert_eq!(store.mail_queue().await.expect("the store"), MailQueue { waiting: 2, dead: 1 });

    let before = database.everything().await;
    assert!(
        !settle_as_failed(store.as_ref(), &mail, MailRetry::After(Duration::ZERO)).await,
        "a dead mail is not retried"
    );
    let later = store.mail_failed(mail.id, mail.attempt, MailRetry::Never, NOW + 1.hours()).await;
    assert!(!later.expect("the store"), "the time at which it was given up does not change");
    assert_eq!(database.everything().await, before);

    assert_eq!(deliver(store.as_ref()).await.len(), 2);
    database.age_mails(Duration::from_hours(24 * 365)).await;
    assert_eq!(claim(store.as_ref()).await, MailClaim::NoneDue);
    assert_eq!(database.outbox().await.len(), 1, "a dead mail is kept for an operator");
}

/// Such a row was written by a later release or changed by hand.
async fn a_mail_that_cannot_be_read_does_not_block_the_others(database: &Database) {
    let store = database.store().await;
    sign_up(store.as_ref(), "ada").await;
    database.sql.execute("UPDATE mail_outbox SET kind = 'of a release to come'").await;
    sign_up(store.as_ref(), "grace").await;
    database.sql.execute("UPDATE mail_outbox SET recipient = 'no address' WHERE kind = 'verify_email'").await;
    sign_up(store.as_ref(), "linus").await;
    for _ in 0..2 {
        store.claim_mail(NOW, LEASE).await.expect_err("the row cannot be read");
    }
    assert_eq!(claimed(store.as_ref()).await.recipient, address("linus@example.com"));
    assert_eq!(claim(store.as_ref()).await, MailClaim::NoneDue, "unreadable mails are leased like others");
}

async fn a_mail_to_an_address_without_an_account_is_dropped(database: &Database) {
    let store = database.store().await;
    sign_up_without_mail(database, store.as_ref(), "ada").await;
    for kind in [MailKind::VerifyEmail, MailKind::ResetPassword, MailKind::AccountExists] {
        queue_mail(store.as_ref(), &mail(kind, "nobody@example.com", None)).await;
        assert_dropped(database, store.as_ref(), kind).await;
    }
}

async fn a_verification_mail_to_a_verified_address_is_dropped(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    database.set_user(user.id, "email_verified = true").await;
    for user_id in [Some(user.id), None] {
        queue_mail(store.as_ref(), &mail(MailKind::VerifyEmail, "ada@example.com", user_id)).await;
        assert_dropped(database, store.as_ref(), MailKind::VerifyEmail).await;
    }
}

async fn a_disabled_account_is_sent_no_reset_or_email_change_token(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    database.set_user(user.id, "disabled = true").await;
    for purpose in [Purpose::ResetPassword, Purpose::ChangeEmail] {
        queue_mail(store.as_ref(), &mail_with_token(&user, purpose)).await;
        assert_dropped(database, store.as_ref(), MailKind::carrying(purpose)).await;
    }
    queue_mail(store.as_ref(), &mail(MailKind::ResetPassword, "ada@example.com", None)).await;
    assert_dropped(database, store.as_ref(), MailKind::ResetPassword).await;
}

async fn a_mail_whose_token_would_be_expired_is_dropped(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let lifetimes = [
        (Purpose::VerifyEmail, 24.hours()),
        (Purpose::ResetPassword, 30.minutes()),
        (Purpose::ChangeEmail, 24.hours()),
    ];
    for (purpose, lifetime) in lifetimes {
        let mail = mail_with_token(&user, purpose);
        queue_mail(store.as_ref(), &mail).await;
        let in_time = NOW + lifetime - 1.microseconds();
        let claim = store.claim_mail(in_time, Duration::ZERO).await.expect("the store");
        assert!(matches!(claim, MailClaim::Claimed(_)), "{claim:?}");
        let claim = store.claim_mail(NOW + lifetime, LEASE).await.expect("the store");
        assert_eq!(
            claim,
            MailClaim::Dropped(MailKind::carrying(purpose)),
            "at the second claim the token would be expired"
        );
        assert_eq!(database.outbox().await, Vec::<String>::new());
    }
}

async fn a_token_is_not_mailed_to_a_former_address_of_the_account(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    database.set_user(user.id, "email = 'lovelace@example.com'").await;
    for kind in [MailKind::VerifyEmail, MailKind::ResetPassword] {
        for user_id in [Some(user.id), None] {
            queue_mail(store.as_ref(), &mail(kind, "ada@example.com", user_id)).await;
            assert_dropped(database, store.as_ref(), kind).await;
        }
    }
}

async fn a_change_to_the_current_address_is_dropped(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    queue_mail(store.as_ref(), &mail(MailKind::ConfirmEmailChange, "ada@example.com", Some(user.id))).await;
    assert_dropped(database, store.as_ref(), MailKind::ConfirmEmailChange).await;
}

async fn a_notice_is_sent_even_if_its_account_has_changed(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let kinds = [MailKind::EmailChangeRequested, MailKind::EmailChanged, MailKind::PasswordChanged];
    for kind in kinds {
        queue_mail(store.as_ref(), &mail(kind, "ada@example.com", Some(user.id))).await;
    }
    database.set_user(user.id, "email = 'lovelace@example.com', email_verified = true, disabled = true").await;
    let mut sent = Vec::new();
    for kind in kinds {
        let claim = store.claim_mail(NOW + 365.days(), LEASE).await.expect("the store");
        let MailClaim::Claimed(mail) = claim else { panic!("{kind:?}: {claim:?}") };
        assert_eq!(mail.recipient, address("ada@example.com"), "the notice goes to the old address");
        sent.push(mail.kind.as_str());
    }
    sent.sort_unstable();
    assert_eq!(sent, ["email_change_requested", "email_changed", "password_changed"]);
}

async fn give_up(store: &dyn Store, user: &User, days: i64) {
    queue_mail(store, &mail(MailKind::AccountExists, user.email.as_str(), None)).await;
    let mail = claimed(store).await;
    let time = NOW + days.days();
    assert!(store.mail_failed(mail.id, mail.attempt, MailRetry::Never, time).await.expect("the store"));
}

async fn only_expired_tokens_idle_limits_and_old_dead_mails_are_purged(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    for purpose in Purpose::ALL {
        token(store.as_ref(), &user, purpose).await;
    }
    give_up(store.as_ref(), &user, 1).await;
    give_up(store.as_ref(), &user, 2).await;
    queue_mail(store.as_ref(), &mail(MailKind::AccountExists, "ada@example.com", None)).await;
    database.sql.execute("DELETE FROM mail_limits").await;
    queue_mail(store.as_ref(), &mail(MailKind::ResetPassword, "nobody@example.com", None)).await;
    let limits_idle = NOW + NO_LIMIT.interval;

    let purge = async |now, dead_before| {
        store.purge_mail(now, dead_before, 1_000).await.expect("the store");
        let limits = database.sql.number("SELECT count(*) FROM mail_limits").await;
        let dead = store.mail_queue().await.expect("the store").dead;
        (database.tokens().await.len(), limits, dead)
    };
    let tick = 1.microseconds();
    assert_eq!(purge(limits_idle, NOW + 1.days()).await, (3, 1, 2), "nothing can be purged yet");
    assert_eq!(purge(limits_idle + tick, NOW + 1.days() + tick).await, (3, 0, 1));
    assert_eq!(purge(NOW + 30.minutes(), NOW).await, (3, 0, 1));
    assert_eq!(purge(NOW + 30.minutes() + tick, NOW).await, (2, 0, 1), "the reset token has expired");
    assert_eq!(purge(NOW + 24.hours(), NOW + 2.days()).await, (2, 0, 1));
    assert_eq!(purge(NOW + 24.hours() + tick, NOW + 2.days() + tick).await, (0, 0, 0));
    assert_eq!(purge(NOW + 365.days(), NOW + 365.days()).await, (0, 0, 0));
    let waiting = ["account_exists to ada@example.com", "reset_password to nobody@example.com"];
    assert_eq!(database.outbox().await, waiting, "waiting mails are never purged");
}

async fn deleting_an_account_deletes_its_tokens_and_mails(database: &Database) {
    let store = database.store().await;
    for name in ["ada", "grace"] {
        let user = sign_up_without_mail(database, store.as_ref(), name).await;
        for purpose in Purpose::ALL {
            token(store.as_ref(), &user, purpose).await;
        }
        for purpose in Purpose::ALL {
            queue_mail(store.as_ref(), &mail_with_token(&user, purpose)).await;
        }
        queue_mail(store.as_ref(), &mail(MailKind::PasswordChanged, user.email.as_str(), Some(user.id))).await;
    }
    let user = store.credentials(&address("ada@example.com")).await.expect("the store").expect("an account").user;
    database.delete_user(user.id).await;
    let only_for_grace = |lines: Vec<String>| lines.iter().all(|line| line.ends_with("grace@example.com"));
    assert_eq!(database.outbox().await.len(), 4);
    assert!(only_for_grace(database.outbox().await));
    assert_eq!(database.tokens().await.len(), 3);
    assert!(only_for_grace(database.tokens().await));
}
