//! Races between steps of mails, tokens and passwords. Any error fails the test: on PostgreSQL, a deadlock appears as
//! an error.

use std::{collections::HashSet, sync::Arc};

use postern::domain::{
    account::User,
    mail::{MailKind, NewMail},
    one_time::{OneTimeGrant, Purpose},
    ports::{
        EmailConfirmationOutcome, MailClaim, MailRetry, NewSession, PasswordResetOutcome, RotationOutcome,
        SessionOpening, Store,
    },
};
use time::ext::NumericalDuration as _;

use crate::{
    fixtures::{
        NOW, Token, address, claim, confirmation_by, consume_token, deliver, email_change, is_alive, log_in, mail,
        mail_with_token, new_account, new_session, password_change, queue_mail, reset_by, sign_up_without_mail, token,
    },
    parallel::{Stores, all_at_once, replicas, stagger},
    support::{Database, on_each_engine},
};

const ROUNDS: usize = 12;

on_each_engine![
    of_fifty_concurrent_uses_of_one_token_one_succeeds,
    of_accounts_that_confirm_the_same_address_one_gets_it_and_the_others_keep_their_tokens,
    of_a_confirmation_and_a_sign_up_with_the_same_address_one_gets_it,
    after_an_acknowledged_reset_no_older_session_is_alive,
    of_a_concurrent_reset_and_password_change_one_succeeds,
    of_concurrent_changes_of_one_password_one_succeeds,
    each_mail_is_claimed_by_exactly_one_of_many_claimers,
    a_claim_during_a_reset_leaves_no_live_token,
    concurrent_steps_never_fail,
];

async fn of_fifty_concurrent_uses_of_one_token_one_succeeds(database: &Database) {
    let stores = replicas(database).await;
    for round in 0..ROUNDS / 3 {
        for purpose in Purpose::ALL {
            let name = format!("{}-{round}", purpose.as_str());
            let user = sign_up_without_mail(database, stores[0].as_ref(), &name).await;
            let token = token(stores[0].as_ref(), &user, purpose).await;
            let steps = (0..50).map(|number| {
                let (store, token) = (Arc::clone(&stores[number % 2]), token.clone());
                async move { consume_token(store.as_ref(), token, NOW).await }
            });
            let accepted = all_at_once(steps).await.into_iter().filter(|used| *used).count();
            assert_eq!(accepted, 1, "round {round}: {purpose:?}");
            // Its notice was queued once.
            let notices = usize::from(purpose != Purpose::VerifyEmail);
            assert_eq!(database.outbox().await.len(), notices, "round {round}: {purpose:?}");
            deliver(stores[0].as_ref()).await;
        }
        assert_eq!(database.sql.number("SELECT max(password_version) FROM users").await, 1);
    }
}

/// A live token for a user's change to this address.
async fn token_to(store: &dyn Store, user: &User, new: &str) -> OneTimeGrant {
    let mail = mail(MailKind::ConfirmEmailChange, new, Some(user.id));
    queue_mail(store, &mail).await;
    let delivered = deliver(store).await.into_iter().find(|sent| sent.id == mail.id);
    delivered.and_then(|mail| mail.grant).expect("a token")
}

async fn of_accounts_that_confirm_the_same_address_one_gets_it_and_the_others_keep_their_tokens(database: &Database) {
    let stores = replicas(database).await;
    for round in 0..ROUNDS {
        let new = format!("new-{round}@example.com");
        let mut tokens = Vec::new();
        for number in 0..[2, 6][round % 2] {
            let user = sign_up_without_mail(database, stores[0].as_ref(), &format!("user-{round}-{number}")).await;
            tokens.push(token_to(stores[0].as_ref(), &user, &new).await);
        }
        let steps = tokens.clone().into_iter().enumerate().map(|(number, token)| {
            let store = Arc::clone(&stores[number % 2]);
            async move { store.confirm_email_change(confirmation_by(token)).await.expect("the store") }
        });
        let outcomes = all_at_once(steps).await;
        let taken = outcomes.iter().filter(|outcome| **outcome == EmailConfirmationOutcome::EmailTaken).count();
        let changed = outcomes.iter().filter(|outcome| matches!(outcome, EmailConfirmationOutcome::Changed(_))).count();
        assert_eq!((changed, taken), (1, tokens.len() - 1), "round {round}: {outcomes:?}");
        for (token, outcome) in tokens.iter().zip(&outcomes) {
            let left = stores[0].one_time_token(token.id).await.expect("the store").is_some();
            assert_eq!(left, *outcome == EmailConfirmationOutcome::EmailTaken, "round {round}");
        }
        let holders = database.sql.number(&format!("SELECT count(*) FROM users WHERE email = '{new}'")).await;
        assert_eq!(holders, 1, "round {round}");
    }
}

async fn of_a_confirmation_and_a_sign_up_with_the_same_address_one_gets_it(database: &Database) {
    let stores = replicas(database).await;
    for round in 0..ROUNDS * 2 {
        let user = sign_up_without_mail(database, stores[0].as_ref(), &format!("user-{round}")).await;
        let token = token_to(stores[0].as_ref(), &user, &format!("new-{round}@example.com")).await;
        let signing_up = tokio::spawn({
            let store = Arc::clone(&stores[1]);
            async move { store.create_account(new_account(&format!("new-{round}"))).await.expect("the store") }
        });
        stagger(round).await;
        let confirmed = stores[0].confirm_email_change(confirmation_by(token)).await.expect("the store");
        let created = signing_up.await.expect("the task did not panic");
        let created = matches!(created, postern::domain::ports::AccountCreation::Created(_));
        let changed = matches!(confirmed, EmailConfirmationOutcome::Changed(_));
        // A new account that the confirmation finds gives the address up.
        let holder = user_with(stores[0].as_ref(), &format!("new-{round}@example.com")).await;
        assert!(created || changed, "round {round}: {confirmed:?}");
        assert_eq!(holder.id == user.id, changed, "round {round}: {confirmed:?}");
    }
}

async fn user_with(store: &dyn Store, email: &str) -> User {
    store.credentials(&address(email)).await.expect("the store").expect("an account").user
}

/// Logs in with the password of version 0 and refreshes each session, until a login is refused. Returns every token
/// that it received.
pub async fn log_in_until_refused(store: Arc<dyn Store>, user: User) -> Vec<Token> {
    let mut tokens = Vec::new();
    for _ in 0..1_000 {
        let session = new_session(user.id);
        let token = Token { grant: session.grant.clone(), hash: session.refresh_hash };
        if store.open_session(session).await.expect("the store") == SessionOpening::Refused {
            return tokens;
        }
        let next = token.successor("");
        match store.rotate_refresh(token.replaced_by(&next)).await.expect("the store") {
            RotationOutcome::Rotated(_) => tokens.push(next),
            RotationOutcome::Invalid => {}
            other => panic!("no other caller presents this token: {other:?}"),
        }
        tokens.push(token);
    }
    panic!("the password was not changed");
}

/// Starts logins and refreshes with the password of version 0.
async fn start_logins(stores: &Stores, user: &User) -> Vec<tokio::task::JoinHandle<Vec<Token>>> {
    let mut logins = Vec::new();
    for store in stores {
        log_in(store.as_ref(), user).await;
        logins.push(tokio::spawn(log_in_until_refused(Arc::clone(store), user.clone())));
    }
    logins
}

async fn assert_all_ended(store: &dyn Store, tokens: &[Token]) {
    for token in tokens {
        assert!(!is_alive(store, token).await);
        let outcome = store.rotate_refresh(token.rotation()).await.expect("the store");
        assert_eq!(outcome, RotationOutcome::Invalid);
    }
}

async fn after_an_acknowledged_reset_no_older_session_is_alive(database: &Database) {
    let stores = replicas(database).await;
    for round in 0..ROUNDS {
        let user = sign_up_without_mail(database, stores[0].as_ref(), &format!("user-{round}")).await;
        let reset = reset_by(token(stores[0].as_ref(), &user, Purpose::ResetPassword).await);
        let logins = start_logins(&stores, &user).await;
        stagger(round * 10).await;
        let outcome = stores[1].reset_password(reset).await.expect("the store");
        assert_eq!(outcome, PasswordResetOutcome::Reset);
        // From now on no session is open, although logins are still tried.
        assert_eq!(database.sessions_where("revoke_time IS NULL").await, 0, "round {round}");
        let changed = stores[0].change_password(password_change(&user)).await.expect("the store");
        assert_eq!(changed, SessionOpening::Refused, "the old password is no longer valid");
        for tokens in logins {
            assert_all_ended(stores[1].as_ref(), &tokens.await.expect("the task did not panic")).await;
        }
        assert_eq!(database.sessions_where("revoke_time IS NULL").await, 0, "round {round}");
        deliver(stores[0].as_ref()).await;
    }
}

/// A change of the password voids the reset token, and a reset replaces the password that the change was verified by.
async fn of_a_concurrent_reset_and_password_change_one_succeeds(database: &Database) {
    let stores = replicas(database).await;
    for round in 0..ROUNDS * 2 {
        let user = sign_up_without_mail(database, stores[0].as_ref(), &format!("user-{round}")).await;
        let reset = reset_by(token(stores[0].as_ref(), &user, Purpose::ResetPassword).await);
        let older = log_in(stores[0].as_ref(), &user).await;
        let change = password_change(&user);
        let new_token = Token { grant: change.session.grant.clone(), hash: change.session.refresh_hash };
        let changing = tokio::spawn({
            let store = Arc::clone(&stores[0]);
            async move { store.change_password(change).await.expect("the store") }
        });
        stagger(round).await;
        let reset = stores[1].reset_password(reset).await.expect("the store") == PasswordResetOutcome::Reset;
        let changed = changing.await.expect("the task did not panic") != SessionOpening::Refused;
        assert!(reset != changed, "round {round}: exactly one of the two succeeds");
        assert!(!is_alive(stores[0].as_ref(), &older).await, "round {round}");
        assert_eq!(is_alive(stores[0].as_ref(), &new_token).await, changed, "round {round}");
        assert_eq!(database.sql.number("SELECT max(password_version) FROM users").await, 1);
    }
}

async fn of_concurrent_changes_of_one_password_one_succeeds(database: &Database) {
    let stores = replicas(database).await;
    for round in 0..ROUNDS {
        let user = sign_up_without_mail(database, stores[0].as_ref(), &format!("user-{round}")).await;
        let version = i64::try_from(round % 2).expect("the number fits");
        database.set_user(user.id, &format!("password_version = {version}")).await;
        let changes = (0..20).map(|number| {
            let (store, mut change) = (Arc::clone(&stores[number % 2]), password_change(&user));
            change.session = NewSession { password_version: version, ..change.session };
            async move { store.change_password(change).await.expect("the store") }
        });
        let outcomes = all_at_once(changes).await;
        let succeeded = outcomes.iter().filter(|outcome| **outcome != SessionOpening::Refused).count();
        assert_eq!(succeeded, 1, "round {round}: {outcomes:?}");
        let id = database.id(user.id.0);
        assert_eq!(database.sessions_where(&format!("user_id = {id}")).await, 1);
    }
}

async fn each_mail_is_claimed_by_exactly_one_of_many_claimers(database: &Database) {
    let stores = replicas(database).await;
    let mut users = Vec::new();
    for number in 0..5 {
        users.push(sign_up_without_mail(database, stores[0].as_ref(), &format!("user-{number}")).await);
    }
    for round in 0..ROUNDS / 2 {
        let mut queued = HashSet::new();
        for user in &users {
            for purpose in Purpose::ALL {
                let with_token = mail_with_token(user, purpose);
                let notice = mail(MailKind::PasswordChanged, user.email.as_str(), Some(user.id));
                for mail in [with_token, notice] {
                    queue_mail(stores[0].as_ref(), &mail).await;
                    queued.insert(mail.id);
                }
            }
        }
        let claimers = (0..20).map(|number| {
            let store = Arc::clone(&stores[number % 2]);
            async move {
                let mut claimed = Vec::new();
                while let MailClaim::Claimed(mail) = claim(store.as_ref()).await {
                    assert_eq!(mail.attempt, 1);
                    claimed.push(mail.id);
                }
                claimed
            }
        });
        let claimed: Vec<_> = all_at_once(claimers).await.into_iter().flatten().collect();
        assert_eq!(claimed.len(), queued.len(), "round {round}: each mail is claimed once");
        assert_eq!(claimed.into_iter().collect::<HashSet<_>>(), queued, "round {round}: every mail is claimed");
        database.sql.execute("DELETE FROM mail_outbox").await;
    }
}

async fn a_claim_during_a_reset_leaves_no_live_token(database: &Database) {
    let stores = replicas(database).await;
    for round in 0..ROUNDS * 2 {
        let user = sign_up_without_mail(database, stores[0].as_ref(), &format!("user-{round}")).await;
        let reset = reset_by(token(stores[0].as_ref(), &user, Purpose::ResetPassword).await);
        for purpose in Purpose::ALL {
            let older = mail_with_token(&user, purpose);
            queue_mail(stores[0].as_ref(), &NewMail { create_time: NOW - 1.seconds(), ..older }).await;
        }
        for purpose in [Purpose::VerifyEmail, Purpose::ChangeEmail] {
            queue_mail(stores[0].as_ref(), &mail_with_token(&user, purpose)).await;
        }
        let by_address = NewMail { user_id: None, ..mail_with_token(&user, Purpose::VerifyEmail) };
        queue_mail(stores[0].as_ref(), &by_address).await;
        let claimers: Vec<_> = (0..3)
            .map(|number| {
                let store = Arc::clone(&stores[number % 2]);
                tokio::spawn(async move { while claim(store.as_ref()).await != MailClaim::NoneDue {} })
            })
            .collect();
        stagger(round * 2).await;
        let outcome = stores[1].reset_password(reset).await.expect("the store");
        assert_eq!(outcome, PasswordResetOutcome::Reset);
        assert_eq!(database.tokens().await, Vec::<String>::new(), "round {round}");
        for claimer in claimers {
            claimer.await.expect("the task did not panic");
        }
        assert_eq!(database.tokens().await, Vec::<String>::new(), "round {round}");
        let user_name = user.username.as_str();
        assert_eq!(database.outbox().await, [format!("password_changed to {user_name}@example.com")], "round {round}");
        database.sql.execute("DELETE FROM mail_outbox").await;
    }
}

/// Runs the writing step with this number on an account.
async fn any_step(store: &dyn Store, user: &User, tokens: &[OneTimeGrant], session: &Token, number: usize) {
    match number % 13 {
        0 => drop(store.create_account(new_account(&format!("new-{}", user.username.as_str()))).await.expect("a step")),
        1 => drop(store.open_session(new_session(user.id)).await.expect("a step")),
        2 => drop(store.rotate_refresh(session.rotation()).await.expect("a step")),
        3 => drop(store.logout(session.logout_everywhere()).await.expect("a step")),
        4 => queue_mail(store, &NewMail { user_id: None, ..mail_with_token(user, Purpose::ALL[number % 2]) }).await,
        5 => drop(store.request_email_change(email_change(user, "free@example.com")).await.expect("a step")),
        6 => drop(store.change_password(password_change(user)).await.expect("a step")),
        7 => drop(store.purge_mail(NOW + 1.days() + 1.seconds(), NOW + 1.days(), 1_000).await.expect("a step")),
        8 | 9 => {
            if let MailClaim::Claimed(mail) = claim(store).await {
                store.mail_failed(mail.id, mail.attempt, MailRetry::Never, NOW).await.expect("a step");
            }
        }
        10..=12 => drop(consume_token(store, tokens[number % 3].clone(), NOW).await),
        _ => unreachable!("the remainder is less than 13"),
    }
}

async fn concurrent_steps_never_fail(database: &Database) {
    let stores = replicas(database).await;
    for round in 0..ROUNDS {
        let mut accounts = Vec::new();
        for name in ["ada", "grace"] {
            let user = sign_up_without_mail(database, stores[0].as_ref(), &format!("{name}-{round}")).await;
            let mut tokens = Vec::new();
            for purpose in Purpose::ALL {
                tokens.push(token(stores[0].as_ref(), &user, purpose).await);
            }
            let session = log_in(stores[0].as_ref(), &user).await;
            accounts.push(Arc::new((user, tokens, session)));
        }
        let steps = (0..52).map(|number| {
            let (store, account) = (Arc::clone(&stores[number % 2]), Arc::clone(&accounts[number / 2 % 2]));
            async move {
                let (user, tokens, session) = &*account;
                any_step(store.as_ref(), user, tokens, session, number * 5 + round).await;
            }
        });
        all_at_once(steps).await;
        for (user, ..) in accounts.iter().map(AsRef::as_ref) {
            database.delete_user(user.id).await;
        }
    }
}
