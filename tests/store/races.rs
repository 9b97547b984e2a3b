//! Races between steps of sessions and sign-ups. Each race is run often enough to fail if a step is wrong. Where
//! PostgreSQL decides by a lock, a test holds that lock while the step runs, so that it fails every time.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::future::join_all;
use postern::domain::{
    account::{Email, Username},
    ports::{AccountCreation, LogoutOutcome, NewAccount, RotationOutcome, SessionOpening, Store},
    seen::SeenGeneration,
};
use time::ext::NumericalDuration as _;

use crate::{
    fixtures::{Token, is_alive, log_in, new_account, new_session, refresh, sign_up},
    parallel::{Stores, all_at_once, assert_waits, begin, replicas, stagger},
    support::{Database, Engine, on_each_engine, with_database},
};

const ROUNDS: usize = 20;

on_each_engine![
    of_sixteen_concurrent_refreshes_one_rotates_and_the_others_get_the_same_token,
    of_sixteen_concurrent_refreshes_without_a_retry_window_one_rotates_and_the_session_ends,
    after_an_acknowledged_logout_no_refresh_restores_the_session,
    after_an_acknowledged_logout_everywhere_no_refresh_restores_a_session,
    a_session_that_opens_during_a_logout_everywhere_opens_before_or_after_it,
    of_concurrent_sign_ups_with_one_address_one_succeeds,
    of_concurrent_sign_ups_with_one_username_one_succeeds,
];

async fn sixteen_refreshes(stores: &Stores, token: &Token, window: Duration) -> (Vec<Token>, Vec<RotationOutcome>) {
    let mut winners = Vec::new();
    let mut others = Vec::new();
    let steps = (0..16).map(|number| {
        let store = Arc::clone(&stores[number % 2]);
        let mut next = token.successor(&number.to_string());
        next.grant.issue_time += i64::try_from(number).expect("the number fits").seconds();
        let mut rotation = token.replaced_by(&next);
        rotation.retry_window = window;
        async move { (next, store.rotate_refresh(rotation).await.expect("the store")) }
    });
    for (next, outcome) in all_at_once(steps).await {
        match outcome {
            RotationOutcome::Rotated(_) => winners.push(next),
            other => others.push(other),
        }
    }
    (winners, others)
}

async fn of_sixteen_concurrent_refreshes_one_rotates_and_the_others_get_the_same_token(database: &Database) {
    let stores = replicas(database).await;
    let user = sign_up(stores[0].as_ref(), "ada").await;
    let mut token = log_in(stores[0].as_ref(), &user).await;
    for round in 0..ROUNDS {
        let (winners, others) = sixteen_refreshes(&stores, &token, Duration::from_mins(1)).await;
        assert_eq!(winners.len(), 1, "round {round}");
        for other in others {
            let RotationOutcome::Replayed { grant, hash, .. } = other else {
                panic!("round {round}: {other:?}");
            };
            assert_eq!(Token { grant, hash }, winners[0], "round {round}");
        }
        token = winners[0].clone();
        assert_eq!(database.sessions_where(&format!("generation = {}", round + 1)).await, 1);
    }
}

async fn of_sixteen_concurrent_refreshes_without_a_retry_window_one_rotates_and_the_session_ends(database: &Database) {
    let stores = replicas(database).await;
    let user = sign_up(stores[0].as_ref(), "ada").await;
    for round in 0..ROUNDS {
        let token = log_in(stores[0].as_ref(), &user).await;
        let (winners, others) = sixteen_refreshes(&stores, &token, Duration::ZERO).await;
        assert_eq!(winners.len(), 1, "round {round}");
        assert!(others.contains(&RotationOutcome::Reused), "round {round}: {others:?}");
        let refused = |outcome: &RotationOutcome| matches!(outcome, RotationOutcome::Reused | RotationOutcome::Invalid);
        assert!(others.iter().all(refused), "round {round}: {others:?}");
        assert!(!is_alive(stores[0].as_ref(), &token).await, "round {round}");
    }
}

/// Refreshes a session until it has ended. Returns the last token.
async fn refresh_until_ended(store: Arc<dyn Store>, mut token: Token) -> Token {
    for _ in 0..1_000 {
        let next = token.successor("");
        match store.rotate_refresh(token.replaced_by(&next)).await.expect("the store") {
            RotationOutcome::Rotated(_) => token = next,
            RotationOutcome::Invalid => return token,
            other => panic!("no other caller presents this token: {other:?}"),
        }
    }
    panic!("the session did not end");
}

async fn assert_nothing_alive(database: &Database, store: &dyn Store, tokens: &[Token]) {
    for token in tokens {
        assert!(!is_alive(store, token).await);
        let outcome = store.rotate_refresh(token.rotation()).await.expect("the store");
        assert_eq!(outcome, RotationOutcome::Invalid);
    }
    assert_eq!(database.sessions_where("revoke_time IS NULL").await, 0);
}

async fn after_an_acknowledged_logout_no_refresh_restores_the_session(database: &Database) {
    let stores = replicas(database).await;
    let user = sign_up(stores[0].as_ref(), "ada").await;
    for round in 0..ROUNDS {
        let token = log_in(stores[0].as_ref(), &user).await;
        let refreshing = tokio::spawn(refresh_until_ended(Arc::clone(&stores[0]), token.clone()));
        stagger(round).await;
        assert_eq!(stores[1].logout(token.logout()).await.expect("the store"), LogoutOutcome::LoggedOut);
        // From now on the session is ended, although refreshes are still tried.
        assert_nothing_alive(database, stores[1].as_ref(), std::slice::from_ref(&token)).await;
        let last = refreshing.await.expect("the task did not panic");
        assert_nothing_alive(database, stores[1].as_ref(), &[last]).await;
    }
}

async fn after_an_acknowledged_logout_everywhere_no_refresh_restores_a_session(database: &Database) {
    let stores = replicas(database).await;
    let user = sign_up(stores[0].as_ref(), "ada").await;
    for round in 0..ROUNDS {
        let own = log_in(stores[0].as_ref(), &user).await;
        let mut refreshing = Vec::new();
        for _ in 0..3 {
            let token = log_in(stores[0].as_ref(), &user).await;
            refreshing.push(tokio::spawn(refresh_until_ended(Arc::clone(&stores[0]), token)));
        }
        stagger(round).await;
        let outcome = stores[1].logout(own.logout_everywhere()).await.expect("the store");
        assert_eq!(outcome, LogoutOutcome::LoggedOut);
        assert_nothing_alive(database, stores[1].as_ref(), &[own]).await;
        for last in join_all(refreshing).await {
            assert_nothing_alive(database, stores[1].as_ref(), &[last.expect("the task did not panic")]).await;
        }
    }
}

async fn a_session_that_opens_during_a_logout_everywhere_opens_before_or_after_it(database: &Database) {
    let stores = replicas(database).await;
    let user = sign_up(stores[0].as_ref(), "ada").await;
    for round in 0..ROUNDS {
        let own = log_in(stores[0].as_ref(), &user).await;
        // Every call and every answer takes the next number, which gives the order of all of them.
        let order = Arc::new(AtomicUsize::new(0));
        let openings = (0..8).map(|number| {
            let (store, order, session) = (Arc::clone(&stores[0]), Arc::clone(&order), new_session(user.id));
            tokio::spawn(async move {
                stagger(number * 10).await;
                let token = Token { grant: session.grant.clone(), hash: session.refresh_hash };
                let called = order.fetch_add(1, Ordering::SeqCst);
                let opening = store.open_session(session).await.expect("the store");
                assert!(matches!(opening, SessionOpening::Opened(_)), "{opening:?}");
                (token, called, order.fetch_add(1, Ordering::SeqCst))
            })
        });
        let openings: Vec<_> = openings.collect();
        stagger(round).await;
        let called = order.fetch_add(1, Ordering::SeqCst);
        let outcome = stores[1].logout(own.logout_everywhere()).await.expect("the store");
        let answered = order.fetch_add(1, Ordering::SeqCst);
        assert_eq!(outcome, LogoutOutcome::LoggedOut);
        for opening in join_all(openings).await {
            let (token, opening_called, opened) = opening.expect("the task did not panic");
            let alive = is_alive(stores[0].as_ref(), &token).await;
            assert!(
                !(alive && opened < called),
                "round {round}: the session was opened before the logout and is still alive"
            );
            assert!(
                alive || opening_called < answered,
                "round {round}: the session was opened after the logout and has ended"
            );
            // The database agrees.
            assert_ne!(alive, database.is_revoked(&token).await);
        }
    }
}

async fn of_concurrent_sign_ups_with_one_address_one_succeeds(database: &Database) {
    let stores = replicas(database).await;
    for round in 0..ROUNDS {
        let email = Email::parse(&format!("round-{round}@example.com")).expect("an address");
        let account = |number| NewAccount { email: email.clone(), ..new_account(&format!("user-{round}-{number}")) };
        assert_one_succeeds(database, &stores, round, account, &AccountCreation::EmailTaken).await;
    }
}

async fn of_concurrent_sign_ups_with_one_username_one_succeeds(database: &Database) {
    let stores = replicas(database).await;
    for round in 0..ROUNDS {
        let account = |number: usize| {
            let name = format!("{}-{round}", ["ada", "Ada", "ADA", "aDa"][number % 4]);
            let username = Username::parse(&name).expect("a username");
            NewAccount { username, ..new_account(&format!("user-{round}-{number}")) }
        };
        assert_one_succeeds(database, &stores, round, account, &AccountCreation::UsernameTaken).await;
    }
}

/// Signs up accounts concurrently, two in even rounds and eight in odd ones. Asserts that one sign-up succeeds.
async fn assert_one_succeeds(
    database: &Database,
    stores: &Stores,
    round: usize,
    account: impl Fn(usize) -> NewAccount,
    refusal: &AccountCreation,
) {
    let steps = (0..[2, 8][round % 2]).map(|number| {
        let (store, account) = (Arc::clone(&stores[number % 2]), account(number));
        async move { store.create_account(account).await.expect("the store") }
    });
    let (created, refused): (Vec<_>, Vec<_>) =
        all_at_once(steps).await.into_iter().partition(|outcome| matches!(outcome, AccountCreation::Created(_)));
    assert_eq!(created.len(), 1, "round {round}: {created:?}");
    assert!(refused.iter().all(|outcome| outcome == refusal), "round {round}: {refused:?}");
    assert_eq!(
        database.sql.number("SELECT count(*) FROM users").await,
        i64::try_from(round).expect("the number fits") + 1
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_postgres_opening_a_session_waits_for_an_uncommitted_change_of_its_user() {
    with_database(Engine::Postgres, async |database| {
        let store = database.store().await;
        let user = sign_up(store.as_ref(), "ada").await;
        for change in ["disabled = true", "password_version = 1"] {
            database.set_user(user.id, "disabled = false").await;
            let id = database.id(user.id.0);
            let transaction = begin(database, format!("UPDATE users SET {change} WHERE id = {id}")).await;
            let opening = tokio::spawn({
                let (store, session) = (Arc::clone(&store), new_session(user.id));
                async move { store.open_session(session).await.expect("the store") }
            });
            assert_waits(database, &opening).await;
            transaction.commit().await.expect("a commit");
            assert_eq!(opening.await.expect("the task did not panic"), SessionOpening::Refused, "{change}");
            assert_eq!(database.sessions_where("true").await, 0);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_postgres_a_logout_everywhere_ends_an_uncommitted_session() {
    with_database(Engine::Postgres, async |database| {
        let store = database.store().await;
        let user = sign_up(store.as_ref(), "ada").await;
        let token = log_in(store.as_ref(), &user).await;
        let (id, user_id) = (database.id(new_session(user.id).grant.session_id.0), database.id(user.id.0));
        // The statements of `open_session`, not committed yet.
        let opening = begin(
            database,
            format!(
                "SELECT u.id FROM users u WHERE u.id = {user_id} FOR SHARE; \
                 INSERT INTO sessions (id, user_id, create_time, end_time, generation, refresh_hash, \
                 refresh_issue_time, refresh_expire_time, last_refresh_time) \
                 SELECT {id}, user_id, create_time, end_time, 0, refresh_hash, refresh_issue_time, \
                 refresh_expire_time, last_refresh_time FROM sessions"
            ),
        )
        .await;
        let logout = tokio::spawn({
            let (store, logout) = (Arc::clone(&store), token.logout_everywhere());
            async move { store.logout(logout).await.expect("the store") }
        });
        assert_waits(database, &logout).await;
        opening.commit().await.expect("a commit");
        assert_eq!(logout.await.expect("the task did not panic"), LogoutOutcome::LoggedOut);
        assert_eq!(database.sessions_where("revoke_time IS NOT NULL").await, 2);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_postgres_a_refresh_waits_for_an_uncommitted_logout() {
    with_database(Engine::Postgres, async |database| {
        let store = database.store().await;
        let user = sign_up(store.as_ref(), "ada").await;
        let first = log_in(store.as_ref(), &user).await;
        let second = refresh(store.as_ref(), &first).await;
        // The current and the previous token: both must see the change of the other transaction.
        for token in [&second, &first] {
            let id = database.id(token.grant.session_id.0);
            let revoke = format!("UPDATE sessions SET revoke_time = create_time WHERE id = {id}");
            let transaction = begin(database, revoke).await;
            let refreshing = tokio::spawn({
                let (store, rotation) = (Arc::clone(&store), token.rotation());
                async move { store.rotate_refresh(rotation).await.expect("the store") }
            });
            assert_waits(database, &refreshing).await;
            transaction.commit().await.expect("a commit");
            assert_eq!(refreshing.await.expect("the task did not panic"), RotationOutcome::Invalid);
            database.sql.execute(&format!("UPDATE sessions SET revoke_time = NULL WHERE id = {id}")).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_postgres_what_was_seen_of_a_locked_session_is_left_for_later() {
    with_database(Engine::Postgres, async |database| {
        let store = database.store().await;
        let user = sign_up(store.as_ref(), "ada").await;
        let tokens = [log_in(store.as_ref(), &user).await, log_in(store.as_ref(), &user).await];
        let seen = tokens.each_ref().map(|token| SeenGeneration { session: token.grant.session_id, generation: 1 });
        let id = database.id(seen[0].session.0);
        // Another replica writes the same, or the session is being ended.
        let transaction = begin(database, format!("SELECT id FROM sessions WHERE id = {id} FOR UPDATE")).await;
        assert_eq!(store.write_seen(&seen).await.expect("the store"), [seen[0].session]);
        assert_eq!(database.sessions_where("seen_generation = 1").await, 1);
        transaction.rollback().await.expect("a rollback");
        assert_eq!(store.write_seen(&seen[..1]).await.expect("the store"), []);
        assert_eq!(database.sessions_where("seen_generation = 1").await, 2);
    })
    .await;
}

/// SQLite serves one process, but a backup, a migration or an operator's shell can be another one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_sqlite_a_write_waits_for_the_write_of_another_process() {
    with_database(Engine::Sqlite, async |database| {
        let stores = [database.store().await, database.store().await];
        let user = sign_up(stores[0].as_ref(), "ada").await;
        let tokens = [log_in(stores[0].as_ref(), &user).await, log_in(stores[1].as_ref(), &user).await];
        let refreshing = stores.into_iter().zip(tokens).map(|(store, mut token)| async move {
            for _ in 0..30 {
                token = refresh(store.as_ref(), &token).await;
            }
        });
        all_at_once(refreshing).await;
        assert_eq!(database.sessions_where("generation = 30").await, 2);
    })
    .await;
}
