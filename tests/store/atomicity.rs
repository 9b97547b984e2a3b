//! A step that fails changes nothing. Here it fails at its last statement, because the id of its mail is already used.

use postern::{
    domain::{
        ids::MailId,
        mail::{MailKind, NewMail},
        one_time::Purpose,
        ports::{EmailChange, NewAccount, PasswordChange, PasswordReset, Store},
    },
    error::StoreError,
};

use crate::{
    fixtures::{
        LIMIT, confirmation_by, email_change, log_in, mail, mail_with_token, new_account, password_change, queue_mail,
        reset_by, sign_up_without_mail, token,
    },
    support::{Database, on_each_engine},
};

on_each_engine![
    a_sign_up_whose_mail_cannot_be_queued_changes_nothing,
    a_mail_that_cannot_be_queued_is_not_counted,
    an_account_change_whose_mail_cannot_be_queued_changes_nothing,
];

/// The id of a mail in the outbox. No other mail can be queued with it.
async fn used_id(store: &dyn Store) -> MailId {
    let mail = mail(MailKind::AccountExists, "grace@example.com", None);
    queue_mail(store, &mail).await;
    mail.id
}

async fn assert_fails<T: std::fmt::Debug>(
    database: &Database,
    step: impl Future<Output = Result<T, StoreError>>,
    before: &str,
) {
    let failure = step.await.expect_err("two mails have the same id");
    assert!(matches!(failure, StoreError::Broken(_)), "{failure:?}");
    assert_eq!(database.everything().await, before);
}

async fn a_sign_up_whose_mail_cannot_be_queued_changes_nothing(database: &Database) {
    let store = database.store().await;
    let id = used_id(store.as_ref()).await;
    let account = new_account("ada");
    let account = NewAccount { verification: NewMail { id, ..account.verification.clone() }, ..account };
    let before = database.everything().await;
    assert_fails(database, store.create_account(account), &before).await;
}

async fn a_mail_that_cannot_be_queued_is_not_counted(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let id = used_id(store.as_ref()).await;
    let before = database.everything().await;
    let mail = NewMail { id, ..mail_with_token(&user, Purpose::ResetPassword) };
    assert_fails(database, store.request_mail(mail, LIMIT), &before).await;
}

async fn an_account_change_whose_mail_cannot_be_queued_changes_nothing(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    log_in(store.as_ref(), &user).await;
    let reset = token(store.as_ref(), &user, Purpose::ResetPassword).await;
    let change = token(store.as_ref(), &user, Purpose::ChangeEmail).await;
    let id = used_id(store.as_ref()).await;
    let with_used_id = |notice: NewMail| NewMail { id, ..notice };
    let before = database.everything().await;

    let by_token = reset_by(reset);
    let by_token = PasswordReset { notice: with_used_id(by_token.notice.clone()), ..by_token };
    assert_fails(database, store.reset_password(by_token), &before).await;

    let by_password = password_change(&user);
    let by_password = PasswordChange { notice: with_used_id(by_password.notice.clone()), ..by_password };
    assert_fails(database, store.change_password(by_password), &before).await;

    let asked = email_change(&user, "new@example.com");
    let asked = EmailChange { notice: with_used_id(asked.notice.clone()), ..asked };
    assert_fails(database, store.request_email_change(asked), &before).await;

    let mut confirmed = confirmation_by(change);
    confirmed.notice = id;
    assert_fails(database, store.confirm_email_change(confirmed), &before).await;
}
