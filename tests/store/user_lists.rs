//! Lists of accounts: in pages that contain each account once despite concurrent changes, and by prefix of address and
//! username.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use postern::domain::{
    account::{Email, User, Username},
    admin::search_text,
    ids::UserId,
    mail::NewMail,
    ports::{AccountCreation, NewAccount, Store, UserOrder, UserPage},
};
use uuid::Uuid;

use crate::{
    fixtures::{deletion, new_account, roles, sign_up, sign_up_admin},
    parallel::replicas,
    support::{Database, Engine, on_each_engine, with_database},
};

on_each_engine![
    all_accounts_are_listed_in_the_order_of_their_ids,
    accounts_are_listed_exactly_once_while_others_are_created_and_deleted,
    a_search_finds_accounts_by_address_prefix_and_then_by_username_prefix,
    a_search_matches_every_character_literally,
    a_search_continues_after_the_last_account_of_a_page,
];

fn with_id(id: UserId, name: &str) -> NewAccount {
    let account = new_account(name);
    NewAccount { id, verification: NewMail { user_id: Some(id), ..account.verification.clone() }, ..account }
}

async fn page(store: &dyn Store, order: UserOrder, limit: u32) -> Vec<User> {
    let page = store.list_users(UserPage { order, limit }).await.expect("the store");
    assert!(page.len() <= usize::try_from(limit).expect("the number fits"));
    page
}

async fn all_accounts_are_listed_in_the_order_of_their_ids(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    assert_eq!(page(store, UserOrder::ById { after: None }, 3).await, []);
    let mut users = vec![sign_up_admin(database, store, "root").await];
    for number in 0_u128..20 {
        // Ids are not in the order of creation, and differ in all bytes.
        let id = UserId(Uuid::from_u128((number * 7 % 20 + 1) << (number % 5 * 24)));
        let account = with_id(id, &format!("user-{number}"));
        match store.create_account(account).await.expect("the store") {
            AccountCreation::Created(user) => users.push(user),
            other => panic!("{other:?}"),
        }
    }
    users.sort_by_key(|user| user.id);
    users.dedup();
    for limit in [1, 3, 100] {
        let (mut listed, mut after) = (Vec::new(), None);
        loop {
            let users = page(store, UserOrder::ById { after }, limit).await;
            let Some(last) = users.last() else { break };
            assert!(after < Some(last.id), "in pages of {limit}: the list does not advance");
            after = Some(last.id);
            listed.extend(users);
        }
        assert_eq!(listed, users, "in pages of {limit}");
    }
    assert!(users.iter().any(|user| user.roles == roles(&["admin", "user"])));
}

/// Creates and deletes accounts until `stop` is set.
async fn create_and_delete_accounts(store: Arc<dyn Store>, stop: Arc<AtomicBool>, created: Arc<AtomicUsize>) {
    let mut count = 0;
    let mut users = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        // New ids are not only at the end of the list.
        let id = crate::fixtures::new_id();
        let id = UserId(if count % 2 == 0 { Uuid::from_u128(id.as_u128().reverse_bits()) } else { id });
        let account = with_id(id, &format!("stable-passing-{count}"));
        match store.create_account(account).await.expect("the store") {
            AccountCreation::Created(user) => users.push(user),
            other => panic!("{other:?}"),
        }
        if count % 3 > 0 {
            let user = users.swap_remove(count * 31 % users.len());
            store.delete_user(deletion(&user)).await.expect("the store");
        }
        count += 1;
        created.store(count, Ordering::Relaxed);
    }
}

async fn accounts_are_listed_exactly_once_while_others_are_created_and_deleted(database: &Database) {
    let stores = replicas(database).await;
    let mut stable = HashSet::new();
    for number in 0..120 {
        stable.insert(sign_up(stores[0].as_ref(), &format!("stable-{number}")).await.id);
    }
    let stop = Arc::new(AtomicBool::new(false));
    let created = Arc::new(AtomicUsize::new(0));
    let changing =
        tokio::spawn(create_and_delete_accounts(Arc::clone(&stores[1]), Arc::clone(&stop), Arc::clone(&created)));
    for round in 0.. {
        if round >= 12 && created.load(Ordering::Relaxed) >= 20 {
            break;
        }
        let mut listed: Vec<UserId> = Vec::new();
        let mut order = match round % 3 {
            0 => UserOrder::ById { after: None },
            1 => UserOrder::ByEmail { prefix: "stable-".to_owned(), after: None },
            _ => UserOrder::ByUsername { prefix: "stable-".to_owned(), after: None },
        };
        if round == 2 {
            // From now on the addresses do not start with the usernames, so a search by username finds all accounts.
            let change_addresses =
                "UPDATE users SET email = 'x-' || email WHERE email NOT LIKE 'x-%' AND username LIKE 'stable-%'";
            database.sql.execute(change_addresses).await;
        }
        loop {
            let users = page(stores[0].as_ref(), order.clone(), 7).await;
            let Some(last) = users.last() else { break };
            order = match order {
                UserOrder::ById { .. } => UserOrder::ById { after: Some(last.id) },
                UserOrder::ByEmail { prefix, .. } => {
                    UserOrder::ByEmail { prefix, after: Some(last.email.as_str().to_owned()) }
                }
                UserOrder::ByUsername { prefix, .. } => {
                    UserOrder::ByUsername { prefix, after: Some(last.username.as_str().to_ascii_lowercase()) }
                }
            };
            listed.extend(users.iter().map(|user| user.id));
            assert!(listed.len() < 10_000, "round {round}: the list does not end");
        }
        let once: HashSet<_> = listed.iter().copied().collect();
        assert_eq!(once.len(), listed.len(), "round {round}: no account is listed twice");
        if round % 3 == 1 && round > 2 {
            assert!(once.is_disjoint(&stable), "round {round}: the addresses no longer have this prefix");
        } else {
            assert!(
                stable.is_subset(&once),
                "round {round}: {} accounts are missing",
                stable.difference(&once).count()
            );
        }
    }
    stop.store(true, Ordering::Relaxed);
    changing.await.expect("the task did not panic");
}

/// The usernames that a search finds, as the domain searches: by addresses, then by usernames.
async fn search(store: &dyn Store, text: &str) -> Vec<String> {
    let prefix = search_text(text).expect("a query");
    let mut found = page(store, UserOrder::ByEmail { prefix: prefix.clone(), after: None }, 1_000).await;
    found.extend(page(store, UserOrder::ByUsername { prefix, after: None }, 1_000).await);
    found.iter().map(|user| user.username.as_str().to_owned()).collect()
}

async fn account(store: &dyn Store, username: &str, email: &str) {
    let account = NewAccount {
        username: Username::parse(username).expect("a username"),
        email: Email::parse(email).expect("an address"),
        ..new_account("somebody")
    };
    let creation = store.create_account(account).await.expect("the store");
    assert!(matches!(creation, AccountCreation::Created(_)), "{creation:?}");
}

async fn a_search_finds_accounts_by_address_prefix_and_then_by_username_prefix(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    for (username, email) in [
        ("Ada", "lovelace@example.com"),
        ("ADAM", "adam@example.com"),
        ("bob", "Ada.B@example.com"),
        ("adz", "z@example.com"),
        ("ad", "ad@example.net"),
        ("eve", "eve@b\u{fc}cher.example"),
    ] {
        account(store, username, email).await;
    }
    let none: [&str; 0] = [];
    // An account that is found by its address is not found again by its username.
    for text in ["ada", "ADA", " Ada "] {
        assert_eq!(search(store, text).await, ["bob", "ADAM", "Ada"], "{text:?}");
    }
    assert_eq!(search(store, "ad").await, ["ad", "bob", "ADAM", "Ada", "adz"]);
    assert_eq!(search(store, "ada.b@example.com").await, ["bob"], "the whole address");
    assert_eq!(search(store, "ada.b@example.comx").await, none);
    assert_eq!(search(store, "adz").await, ["adz"]);
    assert_eq!(search(store, "ae").await, none);
    assert_eq!(search(store, "z").await, ["adz"]);
    assert_eq!(search(store, "xample").await, none, "only prefixes match");
    assert_eq!(search(store, "eve@xn--bcher-kva").await, ["eve"]);
    for text in ["\u{e9}", "ad\u{e9}", "\u{10ffff}", "a\u{10ffff}", "\u{fc}", "\u{130}"] {
        assert_eq!(search(store, text).await, none, "{text:?}");
    }
}

async fn a_search_matches_every_character_literally(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    for (username, email) in [
        ("a_b", "1@example.com"),
        ("axb", "2@example.com"),
        ("a-b", "3@example.com"),
        ("a.b", "4@example.com"),
        ("x1", "p%q@example.com"),
        ("x2", "pxq@example.com"),
        ("x3", "p_q@example.com"),
        ("x4", "p*q@example.com"),
        ("x5", "p'q@example.com"),
    ] {
        account(store, username, email).await;
    }
    let none: [&str; 0] = [];
    for (text, found) in [
        ("a_", &["a_b"][..]),
        ("a_b", &["a_b"]),
        ("a-b", &["a-b"]),
        ("a.", &["a.b"]),
        ("p%", &["x1"]),
        ("p%q", &["x1"]),
        ("p_", &["x3"]),
        ("p*", &["x4"]),
        ("p'", &["x5"]),
        ("%", &none),
        ("_", &none),
        ("a%", &none),
        ("[a-z]", &none),
        ("a\\_", &none),
    ] {
        assert_eq!(search(store, text).await, found, "{text}");
    }
    // In the order of bytes, whatever the collation of the database.
    assert_eq!(search(store, "a").await, ["a-b", "a.b", "a_b", "axb"]);
    assert_eq!(search(store, "p").await, ["x1", "x5", "x4", "x3", "x2"]);
}

/// A database with a natural-language collation sorts `_` before `-` and `.`; a prefix is a range of bytes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_postgres_the_order_of_a_search_does_not_depend_on_the_collation() {
    for search in [0, 1, 2] {
        with_database(Engine::Postgres, async |database| {
            database.store().await;
            for column in ["email", "username"] {
                let other = format!("ALTER TABLE users ALTER COLUMN {column} TYPE text COLLATE \"und-x-icu\"");
                database.sql.execute(&other).await;
            }
            match search {
                0 => a_search_finds_accounts_by_address_prefix_and_then_by_username_prefix(database).await,
                1 => a_search_matches_every_character_literally(database).await,
                _ => a_search_continues_after_the_last_account_of_a_page(database).await,
            }
        })
        .await;
    }
}

async fn a_search_continues_after_the_last_account_of_a_page(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    for number in 0..9 {
        account(store, &format!("U-{number}"), &format!("mail-{}@example.com", 8 - number)).await;
    }
    account(store, "u", "zz@example.com").await;
    account(store, "u-x", "u-x@example.com").await;
    account(store, "v", "mail@example.com").await;
    let names = |users: Vec<User>| users.iter().map(|user| user.username.as_str().to_owned()).collect::<Vec<_>>();
    let by_email =
        |after: Option<&str>| UserOrder::ByEmail { prefix: "mail-".to_owned(), after: after.map(str::to_owned) };
    let by_username = |prefix: &str, after: Option<&str>| UserOrder::ByUsername {
        prefix: prefix.to_owned(),
        after: after.map(str::to_owned),
    };
    assert_eq!(names(page(store, by_email(None), 2).await), ["U-8", "U-7"]);
    assert_eq!(names(page(store, by_email(Some("mail-1@example.com")), 2).await), ["U-6", "U-5"]);
    assert_eq!(names(page(store, by_email(Some("mail-8@example.com")), 2).await), [""; 0]);
    assert_eq!(names(page(store, by_username("u", None), 3).await), ["u", "U-0", "U-1"]);
    assert_eq!(names(page(store, by_username("u", Some("u")), 2).await), ["U-0", "U-1"]);
    assert_eq!(names(page(store, by_username("u", Some("u-6")), 9).await), ["U-7", "U-8"]);
    // A cursor may be that of a deleted account, or lie before the range.
    assert_eq!(names(page(store, by_username("u-", Some("u-55")), 2).await), ["U-6", "U-7"]);
    assert_eq!(names(page(store, by_username("u-", Some("a")), 2).await), ["U-0", "U-1"]);
}
