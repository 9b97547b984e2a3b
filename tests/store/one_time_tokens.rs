//! One-time tokens: which one is live, what it is valid for, and that it can be used once. The effects of a token on a
//! password are tested in `password_changes.rs`, and on an address in `email_changes.rs`.

use postern::domain::{
    account::User,
    ids::{MailId, UserId},
    mail::MailKind,
    mail::NewMail,
    one_time::{OneTimeGrant, Purpose},
    ports::{EmailConfirmationOutcome, EmailVerification, MailClaim, OneTimeToken, PasswordResetOutcome, Store},
};
use time::ext::NumericalDuration as _;

use crate::{
    fixtures::{
        LEASE, NOW, address, audit_context, audit_context_at, claimed, confirmation_by, consume_token, deliver, log_in,
        mail_with_token, new_id, queue_mail, reset_by, sign_up, sign_up_without_mail, token, verification,
    },
    support::{Database, on_each_engine},
};

on_each_engine![
    a_token_is_stored_when_its_mail_is_claimed_and_reads_back_unchanged,
    an_account_has_one_live_token_per_purpose,
    a_newer_token_replaces_an_older_one,
    a_token_keeps_nothing_of_the_token_that_it_replaces,
    an_older_mail_that_is_claimed_late_does_not_replace_a_newer_token,
    a_retried_mail_carries_the_same_token,
    a_consumed_token_is_not_stored_again_when_its_mail_is_retried,
    a_token_can_be_used_once,
    a_token_is_live_until_the_microsecond_in_which_it_expires,
    a_token_is_valid_only_with_its_exact_grant,
    a_token_is_not_accepted_for_another_purpose,
    a_verification_token_is_valid_only_for_the_address_that_it_was_mailed_to,
    a_verification_verifies_the_address_and_voids_only_verification_tokens_and_mails,
];

async fn a_token_is_stored_when_its_mail_is_claimed_and_reads_back_unchanged(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    for (purpose, lifetime) in
        [(Purpose::VerifyEmail, 24.hours()), (Purpose::ResetPassword, 30.minutes()), (Purpose::ChangeEmail, 24.hours())]
    {
        let mail = mail_with_token(&user, purpose);
        queue_mail(store.as_ref(), &mail).await;
        assert_eq!(
            store.one_time_token(mail.id).await.expect("the store"),
            None,
            "the token is not stored before its mail is claimed"
        );
        // The time of the claim does not matter.
        let claim = store.claim_mail(NOW + 29.minutes(), LEASE).await.expect("the store");
        assert!(matches!(claim, MailClaim::Claimed(_)), "{claim:?}");

        let grant = OneTimeGrant { id: mail.id, purpose, user_id: user.id, email: mail.recipient };
        let expected = OneTimeToken { grant, expire_time: NOW + lifetime, user: user.clone() };
        assert_eq!(store.one_time_token(mail.id).await.expect("the store"), Some(expected));
    }
    assert_eq!(store.one_time_token(MailId(new_id())).await.expect("the store"), None, "no token has this id");
}

async fn an_account_has_one_live_token_per_purpose(database: &Database) {
    let store = database.store().await;
    let mut tokens = Vec::new();
    for name in ["ada", "grace"] {
        let user = sign_up_without_mail(database, store.as_ref(), name).await;
        for purpose in Purpose::ALL {
            tokens.push(token(store.as_ref(), &user, purpose).await);
        }
    }
    for token in tokens {
        let found = store.one_time_token(token.id).await.expect("the store").expect("no token replaced another");
        assert_eq!(found.grant, token);
    }
}

/// Two mails that carry such tokens to a user. The second is a microsecond newer.
fn older_and_newer(user: &User, purpose: Purpose) -> (NewMail, NewMail) {
    let newer = mail_with_token(user, purpose);
    (mail_with_token(user, purpose), NewMail { create_time: newer.create_time + 1.microseconds(), ..newer })
}

fn grant(mail: &NewMail, user: &User, purpose: Purpose) -> OneTimeGrant {
    OneTimeGrant { id: mail.id, purpose, user_id: user.id, email: mail.recipient.clone() }
}

/// Asserts that the older token is dead and the newer one live.
async fn assert_only_newer_is_live(database: &Database, store: &dyn Store, user: &User, mails: &(NewMail, NewMail)) {
    for purpose in Purpose::ALL.into_iter().filter(|purpose| MailKind::carrying(*purpose) == mails.0.kind) {
        let before = database.everything().await;
        assert_eq!(store.one_time_token(mails.0.id).await.expect("the store"), None);
        assert!(!consume_token(store, grant(&mails.0, user, purpose), NOW).await);
        assert_eq!(database.everything().await, before);
        assert!(consume_token(store, grant(&mails.1, user, purpose), NOW).await);
        database.sql.execute("DELETE FROM mail_outbox").await;
    }
}

async fn a_newer_token_replaces_an_older_one(database: &Database) {
    let store = database.store().await;
    for (name, purpose) in ["ada", "grace", "linus"].into_iter().zip(Purpose::ALL) {
        let user = sign_up_without_mail(database, store.as_ref(), name).await;
        let mails = older_and_newer(&user, purpose);
        for mail in [&mails.0, &mails.1] {
            queue_mail(store.as_ref(), mail).await;
            let claim = store.claim_mail(mail.create_time, LEASE).await.expect("the store");
            assert!(matches!(claim, MailClaim::Claimed(_)), "{claim:?}");
        }
        assert_only_newer_is_live(database, store.as_ref(), &user, &mails).await;
    }
}

async fn a_token_keeps_nothing_of_the_token_that_it_replaces(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let mail_after = |minutes: i64, new: &str| NewMail {
        recipient: address(new),
        create_time: NOW + minutes.minutes(),
        ..mail_with_token(&user, Purpose::ChangeEmail)
    };
    let [first, second, third] =
        [mail_after(0, "a@example.com"), mail_after(1, "b@example.com"), mail_after(2, "c@example.com")];
    // The second is claimed last: it is newer than the first, but older than the third.
    for (mail, dropped) in [(&first, false), (&third, false), (&second, true)] {
        queue_mail(store.as_ref(), mail).await;
        let claim = store.claim_mail(NOW + 3.minutes(), LEASE).await.expect("the store");
        assert_eq!(claim == MailClaim::Dropped(mail.kind), dropped, "{claim:?}");
    }
    let grant = grant(&third, &user, Purpose::ChangeEmail);
    let expected = OneTimeToken { grant, expire_time: NOW + 2.minutes() + 24.hours(), user };
    assert_eq!(store.one_time_token(third.id).await.expect("the store"), Some(expected));
    assert_eq!(database.tokens().await, ["change_email of c@example.com"]);
}

async fn an_older_mail_that_is_claimed_late_does_not_replace_a_newer_token(database: &Database) {
    let store = database.store().await;
    for (name, purpose) in ["ada", "grace", "linus"].into_iter().zip(Purpose::ALL) {
        let user = sign_up_without_mail(database, store.as_ref(), name).await;
        let mails = older_and_newer(&user, purpose);
        for mail in [&mails.1, &mails.0] {
            queue_mail(store.as_ref(), mail).await;
            let claim = store.claim_mail(NOW + 1.seconds(), LEASE).await.expect("the store");
            assert_eq!(claim == MailClaim::Dropped(mail.kind), mail == &mails.0, "{claim:?}");
        }
        assert_only_newer_is_live(database, store.as_ref(), &user, &mails).await;
    }
}

async fn a_retried_mail_carries_the_same_token(database: &Database) {
    let store = database.store().await;
    for (name, purpose) in ["ada", "grace", "linus"].into_iter().zip(Purpose::ALL) {
        let user = sign_up_without_mail(database, store.as_ref(), name).await;
        queue_mail(store.as_ref(), &mail_with_token(&user, purpose)).await;
        let first = claimed(store.as_ref()).await;
        let token = store.one_time_token(first.id).await.expect("the store");
        assert!(token.is_some());
        database.age_mails(LEASE).await;
        let second = claimed(store.as_ref()).await;
        assert_eq!((second.attempt, &second.grant), (2, &first.grant));
        assert_eq!(store.one_time_token(first.id).await.expect("the store"), token, "the token does not live longer");
        assert!(consume_token(store.as_ref(), first.grant.expect("a token"), NOW).await);
        deliver(store.as_ref()).await;
    }
}

async fn a_consumed_token_is_not_stored_again_when_its_mail_is_retried(database: &Database) {
    let store = database.store().await;
    for (name, purpose) in ["ada", "grace", "linus"].into_iter().zip(Purpose::ALL) {
        let user = sign_up_without_mail(database, store.as_ref(), name).await;
        // The mail was sent, and the sender stopped before it settled the claim.
        queue_mail(store.as_ref(), &mail_with_token(&user, purpose)).await;
        let mail = claimed(store.as_ref()).await;
        let grant = mail.grant.expect("a token");
        assert!(consume_token(store.as_ref(), grant.clone(), NOW).await);
        database.age_mails(LEASE).await;
        let again = deliver(store.as_ref()).await;
        assert!(again.iter().all(|sent| sent.grant.is_none()), "{again:?}");
        assert!(!consume_token(store.as_ref(), grant, NOW).await);
    }
}

async fn a_token_can_be_used_once(database: &Database) {
    let store = database.store().await;
    for (name, purpose) in ["ada", "grace", "linus"].into_iter().zip(Purpose::ALL) {
        let user = sign_up_without_mail(database, store.as_ref(), name).await;
        let token = token(store.as_ref(), &user, purpose).await;
        assert!(consume_token(store.as_ref(), token.clone(), NOW).await);
        // That of a verification stays, and tells that its link has worked.
        let is_kept = store.one_time_token(token.id).await.expect("the store").is_some();
        assert_eq!(is_kept, purpose == Purpose::VerifyEmail);
        let before = database.everything().await;
        assert!(!consume_token(store.as_ref(), token, NOW).await);
        assert_eq!(database.everything().await, before);
    }
}

async fn a_token_is_live_until_the_microsecond_in_which_it_expires(database: &Database) {
    let store = database.store().await;
    for (name, purpose) in ["ada", "grace", "linus"].into_iter().zip(Purpose::ALL) {
        let user = sign_up_without_mail(database, store.as_ref(), name).await;
        let token = token(store.as_ref(), &user, purpose).await;
        let expire_time = store.one_time_token(token.id).await.expect("the store").expect("a token").expire_time;
        let before = database.everything().await;
        assert!(!consume_token(store.as_ref(), token.clone(), expire_time).await);
        assert_eq!(database.everything().await, before);
        assert!(consume_token(store.as_ref(), token, expire_time - 1.microseconds()).await);
    }
}

async fn a_token_is_valid_only_with_its_exact_grant(database: &Database) {
    let store = database.store().await;
    let other = sign_up_without_mail(database, store.as_ref(), "mallory").await;
    for (name, purpose) in ["ada", "grace", "linus"].into_iter().zip(Purpose::ALL) {
        let user = sign_up_without_mail(database, store.as_ref(), name).await;
        log_in(store.as_ref(), &user).await;
        let token = token(store.as_ref(), &user, purpose).await;
        let mut others = vec![
            OneTimeGrant { id: MailId(new_id()), ..token.clone() },
            OneTimeGrant { user_id: UserId(new_id()), ..token.clone() },
            OneTimeGrant { user_id: other.id, ..token.clone() },
            OneTimeGrant { user_id: other.id, email: other.email.clone(), ..token.clone() },
            OneTimeGrant { email: address("mallory@example.com"), ..token.clone() },
            OneTimeGrant { email: address("free@example.com"), ..token.clone() },
        ];
        others.extend(
            Purpose::ALL
                .into_iter()
                .filter(|other| *other != purpose)
                .map(|other| OneTimeGrant { purpose: other, ..token.clone() }),
        );
        let before = database.everything().await;
        for grant in others {
            assert!(!consume_token(store.as_ref(), grant.clone(), NOW).await, "{grant:?} by {token:?}");
            assert_eq!(database.everything().await, before, "{grant:?}");
        }
        assert!(consume_token(store.as_ref(), token, NOW).await);
    }
}

/// Each step checks the purpose of a token itself, whatever its caller has checked.
async fn a_token_is_not_accepted_for_another_purpose(database: &Database) {
    let store = database.store().await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let verify = token(store.as_ref(), &user, Purpose::VerifyEmail).await;
    let reset = token(store.as_ref(), &user, Purpose::ResetPassword).await;
    let change = token(store.as_ref(), &user, Purpose::ChangeEmail).await;
    let before = database.everything().await;
    let with_purpose = |purpose, token: &OneTimeGrant| OneTimeGrant { purpose, ..token.clone() };
    for wrong in [&reset, &change, &with_purpose(Purpose::ChangeEmail, &verify)] {
        assert_eq!(store.verify_email(verification(wrong.clone(), audit_context())).await.expect("the store"), None);
    }
    for wrong in [&verify, &change, &with_purpose(Purpose::VerifyEmail, &reset)] {
        let outcome = store.reset_password(reset_by(wrong.clone())).await.expect("the store");
        assert_eq!(outcome, PasswordResetOutcome::TokenDead);
    }
    // A change to the account's current address would be refused for another reason.
    database.set_user(user.id, "email = 'lovelace@example.com'").await;
    for wrong in [&verify, &reset, &with_purpose(Purpose::ResetPassword, &change)] {
        let outcome = store.confirm_email_change(confirmation_by(wrong.clone())).await.expect("the store");
        assert_eq!(outcome, EmailConfirmationOutcome::TokenDead);
    }
    database.set_user(user.id, "email = 'ada@example.com'").await;
    assert_eq!(database.everything().await, before);
}

async fn a_verification_token_is_valid_only_for_the_address_that_it_was_mailed_to(database: &Database) {
    let store = database.store().await;
    let user = sign_up(store.as_ref(), "ada").await;
    let token = claimed(store.as_ref()).await.grant.expect("a token");
    database.set_user(user.id, "email = 'lovelace@example.com'").await;
    let before = database.everything().await;
    assert!(!consume_token(store.as_ref(), token.clone(), NOW).await);
    let with_current_email = OneTimeGrant { email: address("lovelace@example.com"), ..token };
    assert!(!consume_token(store.as_ref(), with_current_email, NOW).await);
    assert_eq!(database.everything().await, before);
}

async fn a_verification_verifies_the_address_and_voids_only_verification_tokens_and_mails(database: &Database) {
    let store = database.store().await;
    let other = sign_up_without_mail(database, store.as_ref(), "grace").await;
    let user = sign_up_without_mail(database, store.as_ref(), "ada").await;
    let mut tokens = Vec::new();
    for user in [&user, &other] {
        for purpose in Purpose::ALL {
            tokens.push(token(store.as_ref(), user, purpose).await);
        }
    }
    for user in [&user, &other] {
        for purpose in Purpose::ALL {
            queue_mail(store.as_ref(), &mail_with_token(user, purpose)).await;
        }
        let requested_by_address = NewMail { user_id: None, ..mail_with_token(user, Purpose::VerifyEmail) };
        queue_mail(store.as_ref(), &requested_by_address).await;
    }
    let session = log_in(store.as_ref(), &user).await;

    let now = NOW + 1.minutes();
    let verification = verification(tokens[0].clone(), audit_context_at(now));
    let verification = EmailVerification { session: Some(session.grant.session_id), ..verification };
    let verified = store.verify_email(verification.clone()).await.expect("the store");
    assert_eq!(verified, Some(User { email_verified: true, update_time: now, ..user.clone() }));
    let found = store.credentials(&user.email).await.expect("the store").expect("an account");
    assert_eq!(Some(found.user), verified, "the account reads back as returned");
    assert!(!database.is_revoked(&session).await);

    let of_it = |line: &&String| line.starts_with("verify_email") && line.ends_with(" ada@example.com");
    let (tokens, outbox) = (database.tokens().await, database.outbox().await);
    assert_eq!((tokens.len(), outbox.len()), (6, 6), "{tokens:?} {outbox:?}");
    assert_eq!(outbox.iter().find(of_it), None);
    assert!(tokens.iter().any(|line| of_it(&line)), "it tells that its link has worked");
    let again = EmailVerification { session: None, ..verification };
    assert_eq!(store.verify_email(again).await.expect("the store"), None, "it can do nothing more");
    assert!(!database.is_revoked(&session).await);
    let found = store.credentials(&other.email).await.expect("the store").expect("an account");
    assert_eq!(found.user, other, "the other account does not change");
}
