//! Reading the audit log, newest first, in pages, by user and by action; and its retention.

use postern::domain::{
    audit::{Action, AuditContext, AuditEvent},
    ids::{AuditEventId, UserId},
    ports::{AuditPage, Store},
};
use time::ext::NumericalDuration as _;
use uuid::Uuid;

use crate::{
    attempts::attempt,
    fixtures::{NOW, audit, audit_context_at, new_id, sign_up_without_mail, subject},
    support::{Database, on_each_engine},
};

on_each_engine![
    audit_pages_contain_every_row_once_newest_first,
    an_unknown_action_reads_back_as_it_was_written,
    audit_rows_before_a_moment_are_purged_up_to_the_limit,
];

/// Ids that differ in their first, middle and last bytes, so that all bytes decide their order.
fn event_id(number: usize) -> AuditEventId {
    let number = u128::try_from(number).expect("the number fits");
    AuditEventId(Uuid::from_u128((0x0190_u128 << 112) | ((number % 3) << 96) | ((number % 5) << 60) | number))
}

async fn write(store: &dyn Store, id: AuditEventId, user: UserId, action: Action) {
    let context = AuditContext { event: id, ..audit_context_at(NOW) };
    match action {
        Action::UserDisabled => drop(store.disable_user(user, None, context).await.expect("the store")),
        Action::UserEnabled => drop(store.enable_user(user, context).await.expect("the store")),
        _ => store.attempt_failed(attempt(subject("ada@example.com")), Some(user), context).await.expect("the store"),
    }
}

/// The list, read in pages of three.
async fn pages(store: &dyn Store, user: Option<UserId>, action: Option<Action>) -> Vec<AuditEvent> {
    let mut events: Vec<AuditEvent> = Vec::new();
    loop {
        let before = events.last().map(|event| event.id);
        let page = store.list_audit_events(AuditPage { user, action, before, limit: 3 }).await.expect("the store");
        assert!(page.len() <= 3);
        if page.is_empty() {
            return events;
        }
        events.extend(page);
        assert!(events.len() < 1_000, "the list does not end");
    }
}

async fn audit_pages_contain_every_row_once_newest_first(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let users = [
        sign_up_without_mail(database, store, "ada").await.id,
        sign_up_without_mail(database, store, "grace").await.id,
        UserId(new_id()),
    ];
    database.sql.execute("DELETE FROM audit_events").await;
    for number in 0..40 {
        // Not in the order of the ids.
        let number = number * 7 % 40;
        write(store, event_id(number), users[number % 3], Action::LoginFailed).await;
    }
    for (number, action) in [(40, Action::UserDisabled), (41, Action::UserEnabled), (42, Action::UserDisabled)] {
        write(store, event_id(number), users[0], action).await;
    }
    let all = audit(store).await;
    assert_eq!(all.len(), 43);
    assert!(all.is_sorted_by(|newer, older| newer.id > older.id), "{all:?}");

    let actions = [Action::LoginFailed, Action::UserDisabled, Action::UserEnabled, Action::UserDeleted];
    for user in users.map(Some).into_iter().chain([None, Some(UserId(new_id()))]) {
        for action in actions.map(Some).into_iter().chain([None]) {
            let matches = |event: &&AuditEvent| {
                user.is_none_or(|user| event.user == Some(user))
                    && action.is_none_or(|action| event.action == action.as_str())
            };
            let expected: Vec<_> = all.iter().filter(matches).cloned().collect();
            assert_eq!(pages(store, user, action).await, expected, "{user:?} {action:?}");
        }
    }
}

async fn an_unknown_action_reads_back_as_it_was_written(database: &Database) {
    let store = database.store().await;
    store.attempt_failed(attempt(subject("ada@example.com")), None, audit_context_at(NOW)).await.expect("the store");
    database.sql.execute("UPDATE audit_events SET action = 'key_rotated'").await;
    assert_eq!(audit(store.as_ref()).await[0].action, "key_rotated");
}

async fn audit_rows_before_a_moment_are_purged_up_to_the_limit(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    // A newer id can have an earlier time, since the clocks of replicas differ.
    for second in [5, 1, 4, 2, 3] {
        store
            .attempt_failed(attempt(subject("ada@example.com")), None, audit_context_at(NOW + second.seconds()))
            .await
            .expect("the store");
    }
    let left = async || {
        let mut times: Vec<_> =
            audit(store).await.iter().map(|event| (event.create_time - NOW).whole_seconds()).collect();
        times.sort_unstable();
        times
    };
    assert_eq!(
        store.purge_audit_events(NOW + 1.seconds(), 10).await.expect("the store"),
        0,
        "a row from that moment is not older than it"
    );
    let just_after = NOW + 4.seconds() + 1.microseconds();
    assert_eq!(store.purge_audit_events(just_after, 2).await.expect("the store"), 2);
    assert_eq!(left().await, [3, 4, 5]);
    assert_eq!(store.purge_audit_events(just_after, 10).await.expect("the store"), 2);
    assert_eq!(left().await, [5]);
}
