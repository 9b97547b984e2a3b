//! The audit as it is read and forgotten: newest first, in pages, by user and by action.

use postern::domain::{
    audit::{Action, AuditContext, AuditEvent},
    ids::{AuditEventId, UserId},
    ports::{AuditPage, Store},
};
use time::ext::NumericalDuration as _;
use uuid::Uuid;

use crate::{
    fixtures::{NOW, audit, audit_context_at, new_id, sign_up_quietly},
    support::{Database, on_each_engine},
};

on_each_engine![
    pages_of_the_audit_hold_every_row_once_newest_first,
    an_action_of_another_release_reads_back_as_it_was_written,
    the_oldest_rows_are_forgotten_and_no_more_than_asked,
];

/// Ids whose order is in their first, their middle and their last bytes.
fn event_id(number: usize) -> AuditEventId {
    let number = u128::try_from(number).expect("small");
    AuditEventId(Uuid::from_u128((0x0190_u128 << 112) | ((number % 3) << 96) | ((number % 5) << 60) | number))
}

async fn write(store: &dyn Store, id: AuditEventId, user: UserId, action: Action) {
    let of = AuditContext { event: id, ..audit_context_at(NOW) };
    match action {
        Action::UserDisabled => drop(store.disable_user(user, None, of).await.expect("the store")),
        Action::UserEnabled => drop(store.enable_user(user, of).await.expect("the store")),
        _ => store.login_failed(Some(user), of).await.expect("the store"),
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
        assert!(events.len() < 1_000, "it does not end");
    }
}

async fn pages_of_the_audit_hold_every_row_once_newest_first(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let users = [
        sign_up_quietly(database, store, "ada").await.id,
        sign_up_quietly(database, store, "grace").await.id,
        UserId(new_id()),
    ];
    database.sql.execute("DELETE FROM audit_events").await;
    for number in 0..40 {
        // In another order than that of the ids.
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

async fn an_action_of_another_release_reads_back_as_it_was_written(database: &Database) {
    let store = database.store().await;
    store.login_failed(None, audit_context_at(NOW)).await.expect("the store");
    database.sql.execute("UPDATE audit_events SET action = 'key_rotated'").await;
    assert_eq!(audit(store.as_ref()).await[0].action, "key_rotated");
}

async fn the_oldest_rows_are_forgotten_and_no_more_than_asked(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    // The newer id is not always the later time: replicas' clocks differ.
    for second in [5, 1, 4, 2, 3] {
        store.login_failed(None, audit_context_at(NOW + second.seconds())).await.expect("the store");
    }
    let left = async || {
        let mut times: Vec<_> =
            audit(store).await.iter().map(|event| (event.create_time - NOW).whole_seconds()).collect();
        times.sort_unstable();
        times
    };
    assert_eq!(store.purge_audit_events(NOW + 1.seconds(), 10).await.expect("the store"), 0, "not older than that");
    let just_after = NOW + 4.seconds() + 1.microseconds();
    assert_eq!(store.purge_audit_events(just_after, 2).await.expect("the store"), 2);
    assert_eq!(left().await, [3, 4, 5]);
    assert_eq!(store.purge_audit_events(just_after, 10).await.expect("the store"), 2);
    assert_eq!(left().await, [5]);
}
