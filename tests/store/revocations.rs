//! The log of revocations: a line for each session that ends and each change of roles, and a reader that misses none.

use std::{collections::HashSet, sync::Arc, time::Duration};

use postern::domain::{
    account::User,
    audit::AuditContext,
    ids::SessionId,
    one_time::Purpose,
    ports::{Logout, NewSession, PasswordChange, PasswordReset, Revocation, Revoked, Rotation, Store, UserDeletion},
};
use time::ext::NumericalDuration as _;

use crate::{
    fixtures::{
        NOW, Token, audit_context, audit_context_at, audit_context_of, deletion, log_in, log_out, new_id,
        password_change, refresh, reset_by, sign_up_quietly, token,
    },
    parallel::{all_at_once, begin, replicas},
    support::{Database, Engine, on_each_engine, with_database},
};

on_each_engine![
    each_way_a_session_ends_leaves_one_line_for_each_that_ended,
    a_session_that_many_end_at_once_leaves_one_line,
    what_ends_no_session_leaves_no_line,
    a_reader_gets_what_is_new_in_the_order_of_its_numbers,
    lines_are_forgotten_once_no_token_is_affected_and_numbers_are_not_given_again,
];

/// How sessions end; all but the last few end every session of the account.
#[derive(Debug, Clone, Copy)]
enum End {
    LogoutEverywhere,
    PasswordChange,
    PasswordReset,
    ByAdmin,
    Disabling,
    Deletion,
    Logout,
    Reuse,
    ReuseAtLogout,
    ByOwner,
}

const ALL: [End; 10] = [
    End::LogoutEverywhere,
    End::PasswordChange,
    End::PasswordReset,
    End::ByAdmin,
    End::Disabling,
    End::Deletion,
    End::Logout,
    End::Reuse,
    End::ReuseAtLogout,
    End::ByOwner,
];

impl End {
    fn is_of_one(self) -> bool {
        matches!(self, Self::Logout | Self::Reuse | Self::ReuseAtLogout | Self::ByOwner)
    }

    /// Ends the session of a token twice exchanged, or all of its user's.
    async fn come(self, store: &dyn Store, user: &User, spent: &Token, reset: PasswordReset, of: AuditContext) {
        match self {
            Self::LogoutEverywhere | Self::Logout => {
                let generation = spent.grant.generation + 2;
                let everywhere = matches!(self, Self::LogoutEverywhere);
                let logout = Logout { presented_generation: generation, everywhere, context: of, ..spent.logout() };
                store.logout(logout).await.expect("the store");
            }
            Self::PasswordChange => {
                let change = password_change(user);
                let session = NewSession { context: of, ..change.session.clone() };
                drop(store.change_password(PasswordChange { session, ..change }).await.expect("the store"));
            }
            Self::PasswordReset => {
                store.reset_password(PasswordReset { context: of, ..reset }).await.expect("the store");
            }
            Self::ByAdmin => {
                store.revoke_user_sessions(user.id, of).await.expect("the store");
            }
            Self::Disabling => drop(store.disable_user(user.id, None, of).await.expect("the store")),
            Self::Deletion => {
                let deletion = UserDeletion { context: of, ..deletion(user) };
                store.delete_user(deletion).await.expect("the store");
            }
            Self::Reuse => {
                drop(store.rotate_refresh(Rotation { context: of, ..spent.rotation() }).await.expect("the store"));
            }
            Self::ReuseAtLogout => {
                let logout = Logout { context: of, ..spent.logout_everywhere() };
                store.logout(logout).await.expect("the store");
            }
            Self::ByOwner => {
                store.revoke_session(spent.grant.session_id, user.id, of).await.expect("the store");
            }
        }
    }
}

fn session_of(line: &Revocation) -> SessionId {
    match &line.what {
        Revoked::Session(session) => *session,
        Revoked::Roles(..) => panic!("no roles changed: {line:?}"),
    }
}

/// A user with three open sessions and one that had ended before; the first's token is used up twice over.
async fn user_with_sessions(database: &Database, store: &dyn Store, name: &str) -> (User, Vec<Token>, PasswordReset) {
    let user = sign_up_quietly(database, store, name).await;
    log_out(store, &log_in(store, &user).await).await;
    let open = vec![log_in(store, &user).await, log_in(store, &user).await, log_in(store, &user).await];
    let newer = refresh(store, &open[0]).await;
    refresh(store, &newer).await;
    let reset = reset_by(token(store, &user, Purpose::ResetPassword).await);
    (user, open, reset)
}

async fn newest(store: &dyn Store) -> i64 {
    store.revocations(0, &[]).await.expect("the store").last().map_or(0, |line| line.number)
}

async fn each_way_a_session_ends_leaves_one_line_for_each_that_ended(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    for end in ALL {
        let (user, open, reset) = user_with_sessions(database, store, &format!("{end:?}")).await;
        let after = newest(store).await;
        let of = audit_context_of(Some(user.id));
        // Twice: what has ended does not end again.
        for _ in 0..2 {
            let of = AuditContext { event: audit_context().event, ..of };
            end.come(store, &user, &open[0], reset.clone(), of).await;
        }
        let lines = store.revocations(after, &[]).await.expect("the store");
        let expected = if end.is_of_one() { &open[..1] } else { &open[..] };
        assert_eq!(lines.len(), expected.len(), "{end:?}: {lines:?}");
        let ended: HashSet<_> = lines.iter().map(session_of).collect();
        assert_eq!(ended, expected.iter().map(|token| token.grant.session_id).collect(), "{end:?}");
        for line in lines {
            assert_eq!(line.retain_until, of.retain_until, "{end:?}");
        }
    }
}

async fn a_session_that_many_end_at_once_leaves_one_line(database: &Database) {
    let stores = replicas(database).await;
    for round in 0..8 {
        let (user, open, reset) = user_with_sessions(database, stores[0].as_ref(), &format!("user-{round}")).await;
        let before = database.revocations().await;
        // Not those that open another one.
        let ends = ALL.into_iter().filter(|end| !matches!(end, End::PasswordChange)).enumerate();
        let steps = ends.map(|(number, end)| {
            let (store, user, spent, reset) =
                (Arc::clone(&stores[(number + round) % 2]), user.clone(), open[0].clone(), reset.clone());
            async move { end.come(store.as_ref(), &user, &spent, reset, audit_context()).await }
        });
        all_at_once(steps).await;
        assert_eq!(database.revocations().await - before, 3, "round {round}");
    }
}

async fn what_ends_no_session_leaves_no_line(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let user = sign_up_quietly(database, store, "ada").await;
    let token = log_in(store, &user).await;
    let next = token.successor("");
    for _ in 0..2 {
        store.rotate_refresh(token.replaced_by(&next)).await.expect("the store");
    }
    store.revoke_session(SessionId(new_id()), user.id, audit_context()).await.expect("the store");
    store.enable_user(user.id, audit_context()).await.expect("the store");
    store.login_failed(Some(user.id), audit_context()).await.expect("the store");
    assert_eq!(store.revocations(0, &[]).await.expect("the store"), []);
}

async fn a_reader_gets_what_is_new_in_the_order_of_its_numbers(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let user = sign_up_quietly(database, store, "ada").await;
    let mut ended = Vec::new();
    for _ in 0..6 {
        let token = log_in(store, &user).await;
        log_out(store, &token).await;
        ended.push(token.grant.session_id);
    }
    let all = store.revocations(0, &[]).await.expect("the store");
    assert_eq!(all.iter().map(session_of).collect::<Vec<_>>(), ended);
    assert!(all.is_sorted_by(|one, next| one.number < next.number) && all[0].number > 0, "{all:?}");
    for (seen, line) in all.iter().enumerate() {
        let new = store.revocations(line.number, &[]).await.expect("the store");
        assert_eq!(new, all[seen + 1..]);
    }
    let unknown = [all[5].number + 1, all[5].number + 2];
    assert_eq!(store.revocations(all[5].number, &unknown).await.expect("the store"), []);
}

async fn lines_are_forgotten_once_no_token_is_affected_and_numbers_are_not_given_again(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let user = sign_up_quietly(database, store, "ada").await;
    for minutes in 0..3 {
        let token = log_in(store, &user).await;
        let logout = Logout { context: audit_context_at(NOW + minutes.minutes()), ..token.logout() };
        store.logout(logout).await.expect("the store");
    }
    let all = store.revocations(0, &[]).await.expect("the store");
    let second = all[1].retain_until;
    store.purge_revocations(second).await.expect("the store");
    assert_eq!(store.revocations(0, &[]).await.expect("the store"), all[1..], "it may be presented at that moment");
    store.purge_revocations(second + 1.microseconds()).await.expect("the store");
    assert_eq!(store.revocations(0, &[]).await.expect("the store"), all[2..]);

    store.purge_revocations(second + 1.hours()).await.expect("the store");
    assert_eq!(store.revocations(0, &[]).await.expect("the store"), []);
    log_out(store, &log_in(store, &user).await).await;
    let new = store.revocations(all[2].number, &[]).await.expect("the store");
    assert_eq!(new.len(), 1, "a reader that has seen all before sees this one");
}

/// Numbers are given when a line is written and seen when it is committed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_postgres_a_line_that_is_committed_late_is_found_by_who_asks_for_its_number() {
    with_database(Engine::Postgres, async |database| {
        let store = database.store().await;
        let store = store.as_ref();
        let user = sign_up_quietly(database, store, "ada").await;
        log_out(store, &log_in(store, &user).await).await;
        let first = newest(store).await;

        let late = SessionId(new_id());
        let insert = format!(
            "INSERT INTO revocations (session_id, revoke_time, forget_time) VALUES ({}, now(), now())",
            database.id(late.0)
        );
        let transaction = begin(database, insert).await;
        let token = log_in(store, &user).await;
        log_out(store, &token).await;
        let seen = store.revocations(first, &[]).await.expect("the store");
        let numbers: Vec<_> = seen.iter().map(|line| line.number).collect();
        assert_eq!(numbers, [first + 2], "the higher number is seen first");
        assert_eq!(session_of(&seen[0]), token.grant.session_id);
        assert_eq!(store.revocations(first + 2, &[first + 1]).await.expect("the store"), [], "nothing yet");

        transaction.commit().await.expect("a commit");
        assert_eq!(store.revocations(first + 2, &[]).await.expect("the store"), [], "who does not ask misses it");
        let found = store.revocations(first + 2, &[first + 1, first + 7]).await.expect("the store");
        assert_eq!(found.iter().map(session_of).collect::<Vec<_>>(), [late]);
        assert_eq!(found[0].number, first + 1);

        log_out(store, &log_in(store, &user).await).await;
        let both = store.revocations(first + 2, &[first + 1]).await.expect("the store");
        assert_eq!(both.iter().map(|line| line.number).collect::<Vec<_>>(), [first + 1, first + 3]);
    })
    .await;
}

/// Whether that store hears of what another one writes, within a second. It may not listen yet at first.
async fn hears(writer: &dyn Store, user: &User, listener: &dyn Store, tries: usize) -> bool {
    for _ in 0..tries {
        log_out(writer, &log_in(writer, user).await).await;
        if tokio::time::timeout(Duration::from_secs(1), listener.revocation_written()).await.is_ok() {
            return true;
        }
    }
    false
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_postgres_replicas_that_listen_hear_of_each_others_revocations() {
    with_database(Engine::Postgres, async |database| {
        let writer = database.store().await;
        let user = sign_up_quietly(database, writer.as_ref(), "ada").await;
        let listening = database.store().await;
        assert!(hears(writer.as_ref(), &user, listening.as_ref(), 20).await);
        let postern::database_url::DatabaseUrl::Postgres { url, max_connections, .. } = database.database() else {
            panic!("not PostgreSQL");
        };
        let deaf = postern::database_url::DatabaseUrl::Postgres { url, max_connections, notifications: false };
        let deaf = postern::store::connect(&deaf, postern::store::Migrate::Check).await.expect("a store");
        assert!(!hears(writer.as_ref(), &user, deaf.as_ref(), 2).await);
        for role in ["support", "user"] {
            // A change of roles, too.
            while tokio::time::timeout(Duration::from_millis(200), listening.revocation_written()).await.is_ok() {}
            let names = if role == "user" { vec!["user"] } else { vec![role, "user"] };
            writer.set_roles(user.id, crate::fixtures::roles(&names), audit_context()).await.expect("the store");
            let heard = tokio::time::timeout(Duration::from_secs(10), listening.revocation_written()).await;
            assert!(heard.is_ok(), "{role}");
        }
    })
    .await;
}
