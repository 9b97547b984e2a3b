//! Service accounts and their keys: each step and its outcomes, what it writes to the log of revocations and to the audit
//! log, and the races between the steps.

use postern::domain::{
    audit::{Action, AuditContext, AuditEvent},
    ids::{ServiceAccountId, ServiceKeyId, SessionId, UserId},
    ports::{KeyCreation, NewServiceKey, Revocation, Revoked, ServiceCreation, Store, UserChange},
    role::Role,
    service_account::{SecretHash, ServiceAccount, ServiceKey, ServiceName},
    session::RefreshHash,
};
use time::{Duration, ext::NumericalDuration as _};

use crate::{
    fixtures::{NOW, audit, audit_context, audit_context_by, new_id, roles, sign_up_admin},
    parallel::{all_at_once, replicas},
    support::{Database, on_each_engine},
};

on_each_engine![
    an_account_is_read_as_it_was_written,
    no_two_accounts_have_the_same_name,
    accounts_are_listed_oldest_first_and_their_number_is_limited,
    a_key_is_read_as_it_was_written_and_its_secret_only_for_a_comparison,
    an_account_has_a_limited_number_of_keys,
    a_key_is_deleted_only_through_its_account,
    the_last_use_of_a_key_only_moves_forward,
    each_step_writes_one_audit_row,
    a_step_that_changes_nothing_writes_nothing,
    a_step_without_its_audit_row_changes_nothing,
    the_log_of_revocations_tells_what_ends_tokens,
    a_service_is_not_the_last_admin,
    of_parallel_steps_each_effect_happens_once,
];

const MOST: u32 = 1_000;

/// An account that can be created.
fn new_service(name: &str, role_names: &[&str]) -> ServiceAccount {
    ServiceAccount {
        id: ServiceAccountId(new_id()),
        name: ServiceName::parse(name).expect("a name"),
        roles: roles(role_names),
        disabled: false,
        create_time: NOW,
        update_time: NOW,
    }
}

async fn created(store: &dyn Store, name: &str, role_names: &[&str]) -> ServiceAccount {
    let account = new_service(name, role_names);
    let outcome = store.create_service(account.clone(), MOST, audit_context()).await.expect("the store");
    assert_eq!(outcome, ServiceCreation::Created);
    account
}

fn new_key(account: &ServiceAccount) -> NewServiceKey {
    let key = ServiceKey {
        id: ServiceKeyId(new_id()),
        account: account.id,
        description: "é, \u{1f9a6}".to_owned(),
        create_time: NOW,
        expire_time: None,
        last_use_time: None,
    };
    let secret = SecretHash(RefreshHash::of(&key.id.to_string()).0);
    NewServiceKey { key, secret, most: 20, context: audit_context() }
}

async fn created_key(store: &dyn Store, account: &ServiceAccount) -> ServiceKey {
    let new = new_key(account);
    assert_eq!(store.create_service_key(new.clone()).await.expect("the store"), KeyCreation::Created);
    new.key
}

async fn read(store: &dyn Store, account: &ServiceAccount) -> Option<ServiceAccount> {
    store.service(account.id).await.expect("the store")
}

async fn keys(store: &dyn Store, account: &ServiceAccount) -> Vec<ServiceKey> {
    store.list_service_keys(account.id).await.expect("the store")
}

async fn an_account_is_read_as_it_was_written(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let account = created(store, "billing-worker", &["admin", "reader"]).await;
    let other = created(store, "mailer", &[]).await;
    assert_eq!(read(store, &account).await, Some(account.clone()));
    assert_eq!(store.service_by_name("mailer").await.expect("the store"), Some(other.clone()));
    assert_eq!(store.service_by_name("Mailer").await.expect("the store"), None);

    let context = audit_context_by(None);
    let changed = ServiceAccount { roles: Vec::new(), update_time: context.now, ..account.clone() };
    let answer = store.set_service_roles(account.id, Vec::new(), context).await.expect("the store");
    assert_eq!(answer, Some(changed.clone()));
    assert_eq!(read(store, &account).await, Some(changed.clone()));
    for disabled in [true, false] {
        let context = audit_context();
        let changed = ServiceAccount { disabled, update_time: context.now, ..changed.clone() };
        let answer = store.set_service_disabled(account.id, disabled, None, context).await.expect("the store");
        assert_eq!(answer, Some(changed.clone()));
        assert_eq!(read(store, &account).await, Some(changed));
    }

    let key = created_key(store, &account).await;
    assert!(store.delete_service(account.id, audit_context()).await.expect("the store"));
    assert_eq!(read(store, &account).await, None);
    assert_eq!(keys(store, &account).await, []);
    assert!(store.service_credentials(account.id).await.expect("the store").is_none());
    assert!(!store.delete_service_key(account.id, key.id, audit_context()).await.expect("the store"));
    assert_eq!(read(store, &other).await, Some(other));
}

async fn no_two_accounts_have_the_same_name(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let first = created(store, "worker", &[]).await;
    let before = database.everything().await;
    let again = store.create_service(new_service("worker", &["admin"]), MOST, audit_context()).await;
    assert_eq!(again.expect("the store"), ServiceCreation::NameTaken);
    assert_eq!(database.everything().await, before);
    store.delete_service(first.id, audit_context()).await.expect("the store");
    created(store, "worker", &[]).await;
}

async fn accounts_are_listed_oldest_first_and_their_number_is_limited(database: &Database) {
    let store = database.store().await;
    let mut accounts = Vec::new();
    for number in 0..5 {
        accounts.push(created(store.as_ref(), &format!("worker-{number}"), &[]).await);
    }
    accounts.sort_by_key(|account| account.id.0);
    let all = store.list_services(None, 100).await.expect("the store");
    assert_eq!(all, accounts);
    let page = store.list_services(Some(accounts[1].id), 2).await.expect("the store");
    assert_eq!(page, accounts[2..4]);
    assert_eq!(store.list_services(Some(accounts[4].id), 2).await.expect("the store"), []);

    let before = database.everything().await;
    for (most, name) in [(5, "one-more"), (5, "worker-1"), (4, "one-more")] {
        let outcome = store.create_service(new_service(name, &[]), most, audit_context()).await.expect("the store");
        assert_eq!(outcome, ServiceCreation::TooMany, "{name}");
    }
    assert_eq!(database.everything().await, before);
    let outcome = store.create_service(new_service("one-more", &[]), 6, audit_context()).await.expect("the store");
    assert_eq!(outcome, ServiceCreation::Created);
}

async fn a_key_is_read_as_it_was_written_and_its_secret_only_for_a_comparison(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let (account, other) = (created(store, "a", &["reader"]).await, created(store, "b", &[]).await);
    assert!(store.service_credentials(account.id).await.expect("the store").is_none(), "it has no key yet");
    let mut expiring = new_key(&account);
    expiring.key.expire_time = Some(NOW + 30.days() + Duration::microseconds(1));
    let lasting = new_key(&account);
    for new in [&expiring, &lasting] {
        assert_eq!(store.create_service_key(new.clone()).await.expect("the store"), KeyCreation::Created);
    }
    let foreign = created_key(store, &other).await;
    let mut both = [expiring.key.clone(), lasting.key.clone()];
    both.sort_by_key(|key| key.id.0);
    assert_eq!(keys(store, &account).await, both);
    assert_eq!(keys(store, &other).await, [foreign]);

    let found = store.service_credentials(account.id).await.expect("the store").expect("keys");
    assert_eq!(found.account, account);
    assert_eq!(found.keys.len(), 2);
    for new in [&expiring, &lasting] {
        let (_, secret) = found.keys.iter().find(|(key, _)| *key == new.key).expect("the key");
        assert!(secret.is_same(&new.secret));
    }

    let nobody = new_service("nobody", &[]);
    let outcome = store.create_service_key(new_key(&nobody)).await.expect("the store");
    assert_eq!(outcome, KeyCreation::NoSuchAccount);
    assert!(store.service_credentials(nobody.id).await.expect("the store").is_none());
}

async fn an_account_has_a_limited_number_of_keys(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let (account, other) = (created(store, "a", &[]).await, created(store, "b", &[]).await);
    created_key(store, &other).await;
    let new = |most| NewServiceKey { most, ..new_key(&account) };
    for expected in [KeyCreation::Created, KeyCreation::Created, KeyCreation::TooMany] {
        assert_eq!(store.create_service_key(new(2)).await.expect("the store"), expected);
    }
    let key = keys(store, &account).await.remove(0);
    assert!(store.delete_service_key(account.id, key.id, audit_context()).await.expect("the store"));
    assert_eq!(store.create_service_key(new(2)).await.expect("the store"), KeyCreation::Created);

    // Parallel creations, which each count before one of the others is visible, do not exceed it either.
    let stores = replicas(database).await;
    let third = created(store, "c", &[]).await;
    let creations = (0..8).map(|number| {
        let (store, new) = (stores[number % 2].clone(), NewServiceKey { most: 3, ..new_key(&third) });
        async move { store.create_service_key(new).await.expect("the store") }
    });
    let outcomes = all_at_once(creations).await;
    assert_eq!(outcomes.iter().filter(|outcome| **outcome == KeyCreation::Created).count(), 3, "{outcomes:?}");
    assert_eq!(keys(store, &third).await.len(), 3);
}

async fn a_key_is_deleted_only_through_its_account(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let (account, other) = (created(store, "a", &[]).await, created(store, "b", &[]).await);
    let (first, second) = (created_key(store, &account).await, created_key(store, &account).await);
    let before = database.everything().await;
    for (account, key) in [(&other, first.id), (&account, ServiceKeyId(new_id()))] {
        assert!(!store.delete_service_key(account.id, key, audit_context()).await.expect("the store"));
    }
    assert_eq!(database.everything().await, before);
    assert!(store.delete_service_key(account.id, first.id, audit_context()).await.expect("the store"));
    assert!(!store.delete_service_key(account.id, first.id, audit_context()).await.expect("the store"));
    assert_eq!(keys(store, &account).await, [second]);
}

async fn the_last_use_of_a_key_only_moves_forward(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let account = created(store, "a", &[]).await;
    let (key, unused) = (created_key(store, &account).await, created_key(store, &account).await);
    for (time, expected) in [(NOW, NOW), (NOW - 1.hours(), NOW), (NOW + 1.hours(), NOW + 1.hours())] {
        store.service_key_used(key.id, time).await.expect("the store");
        let found = keys(store, &account).await;
        let of = |wanted: &ServiceKey| found.iter().find(|key| key.id == wanted.id).expect("the key").last_use_time;
        assert_eq!(of(&key), Some(expected));
        assert_eq!(of(&unused), None);
    }
    let before = database.everything().await;
    store.service_key_used(ServiceKeyId(new_id()), NOW).await.expect("the store");
    assert_eq!(database.everything().await, before);
}

/// The audit row of a step on an account or on one of its keys.
fn row(context: &AuditContext, action: Action, id: ServiceAccountId, detail: Option<&str>) -> AuditEvent {
    AuditEvent {
        id: context.event,
        create_time: context.now,
        action: action.as_str().to_owned(),
        actor: context.actor,
        user: Some(id.into()),
        session: None,
        client_ip: Some("2001:db8::7".to_owned()),
        detail: detail.map(str::to_owned),
    }
}

async fn each_step_writes_one_audit_row(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let actor = UserId(new_id());
    let account = new_service("worker", &["reader"]);
    let new = new_key(&account);
    let (id, key) = (account.id, new.key.id);
    let contexts = [(); 7].map(|()| audit_context_by(Some(actor)));
    let [by_creation, by_key, by_roles, by_disabling, by_enabling, by_key_deletion, by_deletion] = contexts;

    store.create_service(account, MOST, by_creation).await.expect("the store");
    store.create_service_key(NewServiceKey { context: by_key, ..new }).await.expect("the store");
    store.set_service_roles(id, roles(&["admin", "reader"]), by_roles).await.expect("the store");
    store.set_service_disabled(id, true, Some("a leak".to_owned()), by_disabling).await.expect("the store");
    store.set_service_disabled(id, false, None, by_enabling).await.expect("the store");
    assert!(store.delete_service_key(id, key, by_key_deletion).await.expect("the store"));
    assert!(store.delete_service(id, by_deletion).await.expect("the store"));

    let of_key = |row| AuditEvent { session: Some(SessionId::from(key)), ..row };
    let mut expected = [
        row(&by_creation, Action::ServiceCreated, id, Some("worker")),
        of_key(row(&by_key, Action::ServiceKeyCreated, id, None)),
        row(&by_roles, Action::RolesChanged, id, Some("reader -> admin reader")),
        row(&by_disabling, Action::ServiceDisabled, id, Some("a leak")),
        row(&by_enabling, Action::ServiceEnabled, id, None),
        of_key(row(&by_key_deletion, Action::ServiceKeyDeleted, id, None)),
        row(&by_deletion, Action::ServiceDeleted, id, Some("worker")),
    ];
    // Ids of the same millisecond are in any order.
    let mut found = audit(store).await;
    found.sort_by_key(|event| event.id.0);
    expected.sort_by_key(|event| event.id.0);
    assert_eq!(found, expected);
}

async fn a_step_that_changes_nothing_writes_nothing(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let account = created(store, "worker", &["reader"]).await;
    let disabled = created(store, "idle", &[]).await;
    store.set_service_disabled(disabled.id, true, None, audit_context()).await.expect("the store");
    let before = database.everything().await;

    let later = || audit_context_by(None);
    let same = store.set_service_roles(account.id, roles(&["reader"]), later()).await.expect("the store");
    assert_eq!(same, Some(account.clone()));
    let same = store.set_service_disabled(account.id, false, None, later()).await.expect("the store");
    assert_eq!(same, Some(account));
    assert!(store.set_service_disabled(disabled.id, true, None, later()).await.expect("the store").is_some());

    let nobody = ServiceAccountId(new_id());
    assert_eq!(store.set_service_roles(nobody, Vec::new(), later()).await.expect("the store"), None);
    assert_eq!(store.set_service_disabled(nobody, true, None, later()).await.expect("the store"), None);
    assert!(!store.delete_service(nobody, later()).await.expect("the store"));
    assert_eq!(database.everything().await, before);
}

async fn a_step_without_its_audit_row_changes_nothing(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let used = audit_context();
    let account = new_service("worker", &["reader"]);
    store.create_service(account.clone(), MOST, used).await.expect("the store");
    let key = created_key(store, &account).await;
    let before = database.everything().await;

    store.create_service(new_service("other", &[]), MOST, used).await.expect_err("the row exists");
    store.create_service_key(NewServiceKey { context: used, ..new_key(&account) }).await.expect_err("the row exists");
    store.set_service_roles(account.id, Vec::new(), used).await.expect_err("the row exists");
    store.set_service_disabled(account.id, true, None, used).await.expect_err("the row exists");
    store.delete_service_key(account.id, key.id, used).await.expect_err("the row exists");
    store.delete_service(account.id, used).await.expect_err("the row exists");
    assert_eq!(database.everything().await, before);
}

async fn the_log_of_revocations_tells_what_ends_tokens(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let account = created(store, "worker", &["reader"]).await;
    let (id, user) = (account.id, UserId::from(account.id));
    let key = created_key(store, &account).await;
    assert_eq!(store.revocations(0, &[]).await.expect("the store"), [], "a new account and a new key end nothing");

    store.set_service_roles(id, roles(&["admin"]), audit_context()).await.expect("the store");
    store.set_service_roles(id, Vec::new(), audit_context()).await.expect("the store");
    store.set_service_disabled(id, true, None, audit_context()).await.expect("the store");
    // Its tokens stay refused, whatever roles it gets.
    store.set_service_roles(id, roles(&["reader"]), audit_context()).await.expect("the store");
    store.set_service_disabled(id, false, None, audit_context()).await.expect("the store");
    store.delete_service_key(id, key.id, audit_context()).await.expect("the store");
    store.delete_service(id, audit_context()).await.expect("the store");

    let entries = store.revocations(0, &[]).await.expect("the store");
    let expected: [Revoked; 7] = [
        Revoked::Roles(user, Some(roles(&["admin"]))),
        Revoked::Roles(user, Some(Vec::new())),
        Revoked::Roles(user, None),
        Revoked::Roles(user, None),
        Revoked::Roles(user, Some(roles(&["reader"]))),
        Revoked::Session(SessionId::from(key.id)),
        Revoked::Roles(user, None),
    ];
    assert_eq!(entries.iter().map(|entry: &Revocation| entry.what.clone()).collect::<Vec<_>>(), expected);
    // Every token from before a step has expired by then.
    assert!(entries.iter().all(|entry| entry.retain_until >= audit_context().retain_until), "{entries:?}");
}

async fn a_service_is_not_the_last_admin(database: &Database) {
    let store = database.store().await;
    let service = created(store.as_ref(), "worker", &["admin"]).await;
    let admin = sign_up_admin(database, store.as_ref(), "ada").await;
    let change = store.set_roles(admin.id, vec![Role::user()], audit_context()).await.expect("the store");
    assert_eq!(change, UserChange::LastAdmin);
    let change = store.disable_user(admin.id, None, audit_context()).await.expect("the store");
    assert_eq!(change, UserChange::LastAdmin);
    // The service can always be taken away, also where no person is an admin.
    database.delete_user(admin.id).await;
    let changed = store.set_service_roles(service.id, Vec::new(), audit_context()).await.expect("the store");
    assert_eq!(changed.map(|account| account.roles), Some(Vec::new()));
    assert!(store.set_service_disabled(service.id, true, None, audit_context()).await.expect("the store").is_some());
    assert!(store.delete_service(service.id, audit_context()).await.expect("the store"));
}

async fn of_parallel_steps_each_effect_happens_once(database: &Database) {
    let stores = replicas(database).await;
    for round in 0..5 {
        let name = format!("worker-{round}");
        let creations = (0..4).map(|number| {
            let (store, account) = (stores[number % 2].clone(), new_service(&name, &[]));
            async move { store.create_service(account, MOST, audit_context()).await.expect("the store") }
        });
        let outcomes = all_at_once(creations).await;
        assert_eq!(outcomes.iter().filter(|outcome| **outcome == ServiceCreation::Created).count(), 1);
        let account = stores[0].service_by_name(&name).await.expect("the store").expect("an account");
        let id = account.id;
        let key = created_key(stores[0].as_ref(), &account).await;

        let before = audit(stores[0].as_ref()).await.len();
        let deletions = (0..4).map(|number| {
            let store = stores[number % 2].clone();
            async move { store.delete_service_key(id, key.id, audit_context()).await.expect("the store") }
        });
        assert_eq!(all_at_once(deletions).await.into_iter().filter(|deleted| *deleted).count(), 1);
        assert_eq!(audit(stores[0].as_ref()).await.len(), before + 1);

        // Every step on one account at once, its deletion twice among them. Neither fails, and no key is left behind.
        created_key(stores[0].as_ref(), &account).await;
        let steps = (0..8).map(|number| {
            let (store, new) = (stores[number % 2].clone(), new_key(&account));
            async move {
                match number / 2 {
                    0 => store.delete_service(id, audit_context()).await.expect("the store"),
                    1 => store.create_service_key(new).await.is_err(),
                    2 => store.set_service_roles(id, roles(&["reader"]), audit_context()).await.is_err(),
                    _ => store.set_service_disabled(id, true, None, audit_context()).await.is_err(),
                }
            }
        });
        assert_eq!(all_at_once(steps).await.into_iter().filter(|deleted| *deleted).count(), 1);
        assert_eq!(database.rows_of("service_accounts").await, Vec::<String>::new());
        assert_eq!(database.rows_of("service_keys").await, Vec::<String>::new());
    }
}
