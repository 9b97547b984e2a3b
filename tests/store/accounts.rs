//! Sign-up, and reading the credentials for a login.

use postern::domain::{
    account::{Email, User, Username},
    ids::UserId,
    mail::MailKind,
    ports::{AccountCreation, Credentials, NewAccount, Store},
    role::Role,
    throttle::AddressLimit,
};
use time::ext::NumericalDuration as _;

use crate::{
    fixtures::{LIMIT, NOW, claimed, mail, new_account, new_id, queue_mail, sign_up, sign_up_without_mail},
    support::{Database, on_each_engine},
};

on_each_engine![
    a_new_account_reads_back_as_it_was_written,
    a_sign_up_with_a_taken_address_is_refused_and_writes_nothing,
    a_sign_up_with_a_taken_username_in_any_case_is_refused_and_writes_nothing,
    if_both_are_taken_the_address_is_reported,
    credentials_contain_the_current_account,
    an_unknown_address_has_no_credentials,
    a_sign_up_queues_one_verification_mail,
    a_refused_sign_up_queues_no_mail,
    a_concealed_sign_up_mails_the_owner_of_the_address_and_changes_nothing_else,
    a_concealed_sign_up_reports_a_taken_username_first_and_queues_no_mail,
    a_sign_up_over_the_mail_limit_succeeds_without_a_mail,
    a_concealed_sign_up_over_the_mail_limit_queues_no_mail,
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

async fn a_sign_up_with_a_taken_address_is_refused_and_writes_nothing(database: &Database) {
    let store = database.store().await;
    let first = new_account("ada");
    let second = NewAccount { email: first.email.clone(), ..new_account("grace") };
    sign_up(store.as_ref(), "ada").await;

    assert_eq!(store.create_account(second).await.expect("the store"), AccountCreation::EmailTaken);
    assert_only_one_account(database).await;
}

async fn a_sign_up_with_a_taken_username_in_any_case_is_refused_and_writes_nothing(database: &Database) {
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

async fn if_both_are_taken_the_address_is_reported(database: &Database) {
    let store = database.store().await;
    sign_up(store.as_ref(), "ada").await;
    sign_up(store.as_ref(), "grace").await;

    let both_of_one_account = new_account("ada");
    assert_eq!(store.create_account(both_of_one_account).await.expect("the store"), AccountCreation::EmailTaken);
    let each_of_another_account = NewAccount { email: new_account("grace").email, ..new_account("ada") };
    assert_eq!(store.create_account(each_of_another_account).await.expect("the store"), AccountCreation::EmailTaken);
}

async fn credentials_contain_the_current_account(database: &Database) {
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

async fn an_unknown_address_has_no_credentials(database: &Database) {
    let store = database.store().await;
    let another = NewAccount { id: UserId(new_id()), ..new_account("ada") };
    assert_eq!(store.credentials(&another.email).await.expect("the store"), None);
    sign_up(store.as_ref(), "grace").await;
    assert_eq!(store.credentials(&another.email).await.expect("the store"), None);
}

async fn a_sign_up_queues_one_verification_mail(database: &Database) {
    let store = database.store().await;
    // Concealment only affects addresses that are taken.
    let owner_notice = Some(mail(MailKind::AccountExists, "ada@example.com", None));
    let account = NewAccount { owner_notice, ..new_account("ada") };
    let creation = store.create_account(account.clone()).await.expect("the store");
    assert!(matches!(creation, AccountCreation::Created(_)), "{creation:?}");

    assert_eq!(database.outbox().await, ["verify_email to ada@example.com"]);
    let mail = claimed(store.as_ref()).await;
    assert_eq!(mail.id, account.verification.id);
    assert_eq!(mail.grant.map(|grant| grant.user_id), Some(account.id));
}

async fn assert_refused(database: &Database, store: &dyn Store, account: NewAccount, refusal: AccountCreation) {
    let before = database.everything().await;
    assert_eq!(store.create_account(account).await.expect("the store"), refusal);
    assert_eq!(database.everything().await, before);
}

async fn a_refused_sign_up_queues_no_mail(database: &Database) {
    let store = database.store().await;
    sign_up_without_mail(database, store.as_ref(), "ada").await;
    let ada = new_account("ada");
    let address = NewAccount { username: new_account("grace").username, ..ada.clone() };
    assert_refused(database, store.as_ref(), address, AccountCreation::EmailTaken).await;
    let username = NewAccount { username: ada.username, ..new_account("grace") };
    assert_refused(database, store.as_ref(), username, AccountCreation::UsernameTaken).await;
}

/// A sign-up with the address of `name` and another username. The caller must not learn that the address is taken.
fn concealed_sign_up(name: &str) -> NewAccount {
    let owner = mail(MailKind::AccountExists, &format!("{name}@example.com"), None);
    NewAccount { username: new_account("mallory").username, owner_notice: Some(owner), ..new_account(name) }
}

async fn a_concealed_sign_up_mails_the_owner_of_the_address_and_changes_nothing_else(database: &Database) {
    let store = database.store().await;
    let owner = sign_up_without_mail(database, store.as_ref(), "ada").await;
    database.sql.execute("DELETE FROM mail_limits").await;
    let before = database.everything().await;

    let account = concealed_sign_up("ada");
    assert_eq!(store.create_account(account.clone()).await.expect("the store"), AccountCreation::EmailTaken);
    assert_eq!(database.outbox().await, ["account_exists to ada@example.com"]);
    let mail = claimed(store.as_ref()).await;
    assert_eq!(Some(mail.id), account.owner_notice.map(|mail| mail.id));
    assert_eq!(mail.recipient, owner.email);
    assert_eq!(mail.grant, None);

    database.sql.execute("DELETE FROM mail_outbox").await;
    database.sql.execute("DELETE FROM mail_limits").await;
    assert_eq!(database.everything().await, before);
}

async fn a_concealed_sign_up_reports_a_taken_username_first_and_queues_no_mail(database: &Database) {
    let store = database.store().await;
    sign_up_without_mail(database, store.as_ref(), "ada").await;
    sign_up_without_mail(database, store.as_ref(), "grace").await;
    for username in ["ada", "Ada", "GRACE"] {
        let account =
            NewAccount { username: Username::parse(username).expect("a username"), ..concealed_sign_up("ada") };
        assert_refused(database, store.as_ref(), account, AccountCreation::UsernameTaken).await;
    }
}

async fn a_sign_up_over_the_mail_limit_succeeds_without_a_mail(database: &Database) {
    let store = database.store().await;
    let limit = AddressLimit { burst: 1, ..LIMIT };
    queue_mail(store.as_ref(), &mail(MailKind::ResetPassword, "ada@example.com", None)).await;
    let account = NewAccount { limit, ..new_account("ada") };
    let creation = store.create_account(account).await.expect("the store");
    assert!(matches!(creation, AccountCreation::Created(_)), "{creation:?}");
    assert_eq!(database.outbox().await, ["reset_password to ada@example.com"]);
}

async fn a_concealed_sign_up_over_the_mail_limit_queues_no_mail(database: &Database) {
    let store = database.store().await;
    // The verification mail of this sign-up has used up the limit.
    sign_up_without_mail(database, store.as_ref(), "ada").await;
    let limit = AddressLimit { burst: 1, ..LIMIT };
    let account = NewAccount { limit, ..concealed_sign_up("ada") };
    assert_refused(database, store.as_ref(), account, AccountCreation::EmailTaken).await;

    let mut later = NewAccount { limit, ..concealed_sign_up("ada") };
    let mail = later.owner_notice.as_mut().expect("a mail");
    mail.create_time += 6.minutes();
    assert_eq!(store.create_account(later).await.expect("the store"), AccountCreation::EmailTaken);
    assert_eq!(database.outbox().await, ["account_exists to ada@example.com"]);
}
