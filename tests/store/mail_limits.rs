//! The limit for mail that other people can request for an address: a burst, and then one mail per interval.

use std::time::Duration;

use postern::domain::{
    mail::MailKind,
    ports::{Enqueued, Store},
    throttle::AddressLimit,
};
use time::{OffsetDateTime, ext::NumericalDuration as _};

use crate::{
    fixtures::{NOW, mail},
    support::{Database, on_each_engine},
};

on_each_engine![
    an_address_gets_a_burst_and_then_one_mail_per_interval,
    a_burst_of_one_allows_one_mail_per_interval,
    unused_mails_add_up_to_at_most_one_burst,
    a_mail_over_the_limit_writes_nothing_and_is_not_counted,
    each_address_has_one_limit_for_all_kinds_of_mail,
    other_mails_cannot_spend_the_budget_of_resets,
    what_a_clock_that_was_ahead_counted_withholds_no_mail,
];

const THREE: AddressLimit = AddressLimit { burst: 3, interval: Duration::from_secs(90) };

async fn request(store: &dyn Store, limit: AddressLimit, now: OffsetDateTime) -> Enqueued {
    let mut mail = mail(MailKind::ResetPassword, "ada@example.com", None);
    mail.create_time = now;
    store.request_mail(mail, limit).await.expect("the store")
}

/// Requests mails until one is over the limit. Returns how many were queued.
async fn request_until_limited(store: &dyn Store, limit: AddressLimit, now: OffsetDateTime) -> u32 {
    let mut queued = 0;
    while request(store, limit, now).await == Enqueued::Queued {
        queued += 1;
        assert!(queued < 100, "the limit is never reached");
    }
    queued
}

async fn an_address_gets_a_burst_and_then_one_mail_per_interval(database: &Database) {
    let store = database.store().await;
    assert_eq!(request_until_limited(store.as_ref(), THREE, NOW).await, 3);
    for interval in 1..4 {
        let next = NOW + (interval * 90).seconds();
        assert_eq!(
            request_until_limited(store.as_ref(), THREE, next - 1.microseconds()).await,
            0,
            "the interval is not over"
        );
        assert_eq!(request_until_limited(store.as_ref(), THREE, next).await, 1);
    }
    assert_eq!(database.sql.number("SELECT count(*) FROM mail_outbox").await, 6);
}

async fn a_burst_of_one_allows_one_mail_per_interval(database: &Database) {
    let store = database.store().await;
    let one = AddressLimit { burst: 1, ..THREE };
    assert_eq!(request_until_limited(store.as_ref(), one, NOW).await, 1);
    assert_eq!(request_until_limited(store.as_ref(), one, NOW + 90.seconds() - 1.microseconds()).await, 0);
    assert_eq!(request_until_limited(store.as_ref(), one, NOW + 90.seconds()).await, 1);
}

async fn unused_mails_add_up_to_at_most_one_burst(database: &Database) {
    let store = database.store().await;
    assert_eq!(request_until_limited(store.as_ref(), THREE, NOW).await, 3);
    let two_intervals = NOW + 180.seconds();
    assert_eq!(request_until_limited(store.as_ref(), THREE, two_intervals).await, 2);
    assert_eq!(request_until_limited(store.as_ref(), THREE, two_intervals + 30.days()).await, 3);
}

async fn a_mail_over_the_limit_writes_nothing_and_is_not_counted(database: &Database) {
    let store = database.store().await;
    assert_eq!(request_until_limited(store.as_ref(), THREE, NOW).await, 3);
    let before = database.everything().await;
    for second in 0..89 {
        assert_eq!(request(store.as_ref(), THREE, NOW + second.seconds()).await, Enqueued::OverLimit);
    }
    assert_eq!(database.everything().await, before);
    assert_eq!(request(store.as_ref(), THREE, NOW + 90.seconds()).await, Enqueued::Queued);
}

async fn each_address_has_one_limit_for_all_kinds_of_mail(database: &Database) {
    let store = database.store().await;
    assert_eq!(request_until_limited(store.as_ref(), THREE, NOW).await, 3);
    let verify = |recipient| mail(MailKind::VerifyEmail, recipient, None);
    let to_ada = store.request_mail(verify("ada@example.com"), THREE).await.expect("the store");
    assert_eq!(to_ada, Enqueued::OverLimit, "the limit holds for all kinds of mail");
    let to_grace = store.request_mail(verify("grace@example.com"), THREE).await.expect("the store");
    assert_eq!(to_grace, Enqueued::Queued, "another address has its own limit");
}

async fn other_mails_cannot_spend_the_budget_of_resets(database: &Database) {
    let store = database.store().await;
    let verify = || mail(MailKind::VerifyEmail, "ada@example.com", None);
    while store.request_mail(verify(), THREE).await.expect("the store") == Enqueued::Queued {}
    assert_eq!(request_until_limited(store.as_ref(), THREE, NOW).await, 3, "the owner's last way in");
    store.purge_mail(NOW + 1.days(), NOW, 1_000).await.expect("the store");
    assert_eq!(database.sql.number("SELECT count(*) FROM reset_limits").await, 0);
}

async fn what_a_clock_that_was_ahead_counted_withholds_no_mail(database: &Database) {
    let store = database.store().await;
    assert_eq!(request_until_limited(store.as_ref(), THREE, NOW + 2.days()).await, 3);
    assert_eq!(request_until_limited(store.as_ref(), THREE, NOW).await, 3);
    assert_eq!(request_until_limited(store.as_ref(), THREE, NOW).await, 0, "and these count");
}
