//! Sign-up, and the look-up that a login begins with.

use postern::{
    domain::{
        UserId,
        account::{Email, User, Username},
        role::Role,
    },
    store::{AccountCreation, Credentials, NewAccount},
};

use crate::{
    fixtures::{NOW, new_account, new_id, sign_up},
    support::{Database, on_each_engine},
};

on_each_engine![
    a_new_account_reads_back_as_it_was_written,
    an_address_is_taken_once_and_the_second_sign_up_writes_nothing,
    a_username_is_taken_in_any_case_and_the_second_sign_up_writes_nothing,
    where_both_are_taken_the_address_is_named,
    credentials_are_those_of_the_account_as_it_is_now,
    nobody_else_has_the_credentials,
];

async fn a_new_account_reads_back_as_it_was_written(database: &Database) {
    let store = database.store().await;
    let account = new_account("Ada.Lovelace");
    let expected = User {
        id: account.id,
        username: Username::parse("Ada.Lovelace").expect("a username"),
        email: Email::parse("ada.lovelace@example.com").expect("an address"),
        email_verified: false,
        roles: vec![Role::parse("user").expect("a role")],
        disabled: false,
        create_time: NOW,
        update_time: NOW,
    };

    let creation = store.create_account(account.clone()).await.expect("the store");
    assert_eq!(creation, AccountCreation::Created(expected.clone()));

    let credentials = store.credentials(&account.email).await.expect("the store").expect("an account");
    assert_eq!(credentials, Credentials { user: expected, password_hash: account.password_hash, password_version: 0 });
}

async fn an_address_is_taken_once_and_the_second_sign_up_writes_nothing(database: &Database) {
    let store = database.store().await;
    let first = new_account("ada");
    let second = NewAccount { email: first.email.clone(), ..new_account("grace") };
    sign_up(store.as_ref(), "ada").await;

    assert_eq!(store.create_account(second).await.expect("the store"), AccountCreation::EmailTaken);
    assert_only_one_account(database).await;
}

async fn a_username_is_taken_in_any_case_and_the_second_sign_up_writes_nothing(database: &Database) {
    let store = database.store().await;
    sign_up(store.as_ref(), "Ada").await;

    for username in ["Ada", "ada", "ADA"] {
        let second = NewAccount { username: Username::parse(username).expect("a username"), ..new_account("grace") };
        let creation = store.create_account(second).await.expect("the store");
        assert_eq!(creation, AccountCreation::UsernameTaken, "{username}");
    }
    assert_only_one_account(database).await;
}

async fn assert_only_one_account(database: &Database) {
    assert_eq!(database.sql.number("SELECT count(*) FROM users").await, 1);
    assert_eq!(database.sql.number("SELECT count(*) FROM user_roles").await, 1);
}

async fn where_both_are_taken_the_address_is_named(database: &Database) {
    let store = database.store().await;
    sign_up(store.as_ref(), "ada").await;
    sign_up(store.as_ref(), "grace").await;

    let by_one = new_account("ada");
    assert_eq!(store.create_account(by_one).await.expect("the store"), AccountCreation::EmailTaken);
    let by_two = NewAccount { email: new_account("grace").email, ..new_account("ada") };
    assert_eq!(store.create_account(by_two).await.expect("the store"), AccountCreation::EmailTaken);
}

async fn credentials_are_those_of_the_account_as_it_is_now(database: &Database) {
    let store = database.store().await;
    let user = sign_up(store.as_ref(), "ada").await;
    database.add_role(user.id, "billing").await;
    database.add_role(user.id, "admin").await;
    database.set_user(user.id, "disabled = true, email_verified = true, password_version = 3").await;

    let typed = Email::parse("ADA@Example.Com").expect("an address");
    let credentials = store.credentials(&typed).await.expect("the store").expect("an account");
    let roles: Vec<_> = credentials.user.roles.iter().map(Role::as_str).collect();
    assert_eq!(roles, ["admin", "billing", "user"]);
    assert!(credentials.user.disabled);
    assert!(credentials.user.email_verified);
    assert_eq!(credentials.password_version, 3);
}

async fn nobody_else_has_the_credentials(database: &Database) {
    let store = database.store().await;
    let another = NewAccount { id: UserId(new_id()), ..new_account("ada") };
    assert_eq!(store.credentials(&another.email).await.expect("the store"), None);
    sign_up(store.as_ref(), "grace").await;
    assert_eq!(store.credentials(&another.email).await.expect("the store"), None);
}
