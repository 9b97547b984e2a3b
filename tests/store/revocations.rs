//! The log of revocations: an entry for each session that ends and each change of roles, and reading it without gaps.

use std::{collections::HashSet, sync::Arc, time::Duration};

use postern::domain::{
    account::User,
    audit::AuditContext,
    ids::SessionId,
    one_time::Purpose,
    ports::{
        Logout, NewSession, PasswordChange, PasswordReset, REVOCATIONS_AT_ONCE, Revocation, Revoked, Rotation, Store,
        UserDeletion,
    },
    revocation::Revocations,
    role::{Caller, Person},
    token::AccessTokenError,
};
use time::ext::NumericalDuration as _;

use crate::{
    attempts::attempt,
    fixtures::{
        ISSUED, NOW, Token, audit_context, audit_context_at, audit_context_by, deletion, log_in, log_out, new_id,
        password_change, refresh, reset_by, sign_up_without_mail, subject, token,
    },
    parallel::{all_at_once, begin, replicas},
    support::{Database, Engine, on_each_engine, with_database},
};

on_each_engine![
    each_way_to_end_sessions_logs_one_revocation_per_ended_session,
    concurrent_endings_of_one_session_log_one_revocation,
    a_step_that_ends_no_session_logs_no_revocation,
    new_revocations_are_returned_in_the_order_of_their_numbers,
    a_page_of_the_log_is_bounded_by_its_numbers_and_its_size,
    a_log_that_is_longer_than_one_read_is_read_whole,
    revocations_are_purged_once_they_affect_no_token_and_numbers_are_not_reused,
];

/// The ways to end sessions. The last four end one session, the others all sessions of the account.
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

const ENDS: [End; 10] = [
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
    fn ends_one_session(self) -> bool {
        matches!(self, Self::Logout | Self::Reuse | Self::ReuseAtLogout | Self::ByOwner)
    }

    /// Ends the session of a consumed token, or all sessions of its user.
    async fn apply(
        self,
        store: &dyn Store,
        user: &User,
        consumed: &Token,
        reset: PasswordReset,
        context: AuditContext,
    ) {
        match self {
            Self::LogoutEverywhere | Self::Logout => {
                let generation = consumed.grant.generation + 2;
                let everywhere = matches!(self, Self::LogoutEverywhere);
                let logout = Logout { presented_generation: generation, everywhere, context, ..consumed.logout() };
                store.logout(logout).await.expect("the store");
            }
            Self::PasswordChange => {
                let change = password_change(user);
                let session = NewSession { context, ..change.session.clone() };
                drop(store.change_password(PasswordChange { session, ..change }).await.expect("the store"));
            }
            Self::PasswordReset => {
                store.reset_password(PasswordReset { context, ..reset }).await.expect("the store");
            }
            Self::ByAdmin => {
                store.revoke_user_sessions(user.id, context).await.expect("the store");
            }
            Self::Disabling => drop(store.disable_user(user.id, None, context).await.expect("the store")),
            Self::Deletion => {
                let deletion = UserDeletion { context, ..deletion(user) };
                store.delete_user(deletion).await.expect("the store");
            }
            Self::Reuse => {
                drop(store.rotate_refresh(Rotation { context, ..consumed.rotation() }).await.expect("the store"));
            }
            Self::ReuseAtLogout => {
                let logout = Logout { context, ..consumed.logout_everywhere() };
                store.logout(logout).await.expect("the store");
            }
            Self::ByOwner => {
                store.revoke_session(consumed.grant.session_id, user.id, context).await.expect("the store");
            }
        }
    }
}

fn session_of(entry: &Revocation) -> SessionId {
    match &entry.what {
        Revoked::Session(session) => *session,
        Revoked::Roles(..) => panic!("no roles were changed: {entry:?}"),
    }
}

/// A user with an ended session and three open ones. The returned token of the first open session is consumed.
async fn user_with_sessions(database: &Database, store: &dyn Store, name: &str) -> (User, Vec<Token>, PasswordReset) {
    let user = sign_up_without_mail(database, store, name).await;
    log_out(store, &log_in(store, &user).await).await;
    let open = vec![log_in(store, &user).await, log_in(store, &user).await, log_in(store, &user).await];
    let newer = refresh(store, &open[0]).await;
    refresh(store, &newer).await;
    let reset = reset_by(token(store, &user, Purpose::ResetPassword).await);
    (user, open, reset)
}

async fn newest(store: &dyn Store) -> i64 {
    store.revocations(0, &[]).await.expect("the store").last().map_or(0, |entry| entry.number)
}

async fn each_way_to_end_sessions_logs_one_revocation_per_ended_session(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    for end in ENDS {
        let (user, open, reset) = user_with_sessions(database, store, &format!("{end:?}")).await;
        let after = newest(store).await;
        let context = audit_context_by(Some(user.id));
        // A session that has ended does not end again.
        for _ in 0..2 {
            let context = AuditContext { event: audit_context().event, ..context };
            end.apply(store, &user, &open[0], reset.clone(), context).await;
        }
        let mut entries = store.revocations(after, &[]).await.expect("the store");
        // An account that is disabled or deleted also has an entry of its own.
        entries.retain(|entry| matches!(entry.what, Revoked::Session(_)));
        let expected = if end.ends_one_session() { &open[..1] } else { &open[..] };
        assert_eq!(entries.len(), expected.len(), "{end:?}: {entries:?}");
        let ended: HashSet<_> = entries.iter().map(session_of).collect();
        assert_eq!(ended, expected.iter().map(|token| token.grant.session_id).collect(), "{end:?}");
        for entry in entries {
            // The first session was refreshed twice, each time an hour later: its newest token expires after those of
            // the others, although no clock has reached that time yet.
            let is_ahead = session_of(&entry) == open[0].grant.session_id;
            let lifetime = context.retain_until - context.now;
            let expected = if is_ahead { ISSUED + 2.hours() + lifetime } else { context.retain_until };
            assert_eq!(entry.retain_until.unix_timestamp(), expected.unix_timestamp(), "{end:?}");
        }
    }
}

async fn concurrent_endings_of_one_session_log_one_revocation(database: &Database) {
    let stores = replicas(database).await;
    for round in 0..8 {
        let (user, open, reset) = user_with_sessions(database, stores[0].as_ref(), &format!("user-{round}")).await;
        let before = database.revocations().await;
        // A change of the password would open another session.
        let ends = ENDS.into_iter().filter(|end| !matches!(end, End::PasswordChange)).enumerate();
        let steps = ends.map(|(number, end)| {
            let (store, user, consumed, reset) =
                (Arc::clone(&stores[(number + round) % 2]), user.clone(), open[0].clone(), reset.clone());
            async move { end.apply(store.as_ref(), &user, &consumed, reset, audit_context()).await }
        });
        all_at_once(steps).await;
        assert_eq!(database.revocations().await - before, 3, "round {round}");
    }
}

async fn a_step_that_ends_no_session_logs_no_revocation(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let user = sign_up_without_mail(database, store, "ada").await;
    let token = log_in(store, &user).await;
    let next = token.successor("");
    for _ in 0..2 {
        store.rotate_refresh(token.replaced_by(&next)).await.expect("the store");
    }
    store.revoke_session(SessionId(new_id()), user.id, audit_context()).await.expect("the store");
    store.enable_user(user.id, audit_context()).await.expect("the store");
    store.attempt_failed(attempt(subject("ada@example.com")), Some(user.id), audit_context()).await.expect("the store");
    assert_eq!(store.revocations(0, &[]).await.expect("the store"), []);
}

async fn a_log_that_is_longer_than_one_read_is_read_whole(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let user = sign_up_without_mail(database, store, "ada").await;
    let (first, last) = (log_in(store, &user).await, log_in(store, &user).await);
    log_out(store, &first).await;
    let double = "INSERT INTO revocations (session_id, revoke_time, forget_time) \
                  SELECT session_id, revoke_time, forget_time FROM revocations";
    while database.revocations().await < 2 * i64::from(REVOCATIONS_AT_ONCE) {
        database.sql.execute(double).await;
    }
    log_out(store, &last).await;
    assert_eq!(store.revocations(0, &[]).await.expect("the store").len(), REVOCATIONS_AT_ONCE as usize);

    let revocations = Revocations::new(Duration::from_mins(15));
    revocations.poll(store, NOW).await.expect("the store");
    let person = Person { user_id: user.id, session_id: last.grant.session_id, roles: Vec::new() };
    assert_eq!(revocations.check(Caller::Person(person)), Err(AccessTokenError::Revoked));
}

async fn new_revocations_are_returned_in_the_order_of_their_numbers(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let user = sign_up_without_mail(database, store, "ada").await;
    let mut ended = Vec::new();
    for _ in 0..6 {
        let token = log_in(store, &user).await;
        log_out(store, &token).await;
        ended.push(token.grant.session_id);
    }
    let all = store.revocations(0, &[]).await.expect("the store");
    assert_eq!(all.iter().map(session_of).collect::<Vec<_>>(), ended);
    assert!(all.is_sorted_by(|one, next| one.number < next.number) && all[0].number > 0, "{all:?}");
    for (seen, entry) in all.iter().enumerate() {
        let new = store.revocations(entry.number, &[]).await.expect("the store");
        assert_eq!(new, all[seen + 1..]);
    }
    let unknown = [all[5].number + 1, all[5].number + 2];
    assert_eq!(store.revocations(all[5].number, &unknown).await.expect("the store"), []);
}

async fn a_page_of_the_log_is_bounded_by_its_numbers_and_its_size(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let user = sign_up_without_mail(database, store, "ada").await;
    for _ in 0..5 {
        log_out(store, &log_in(store, &user).await).await;
    }
    let all = store.revocations(0, &[]).await.expect("the store");
    let page = async |after, up_to, limit| store.revocation_page(after, up_to, limit).await.expect("the store");
    assert_eq!(page(0, i64::MAX, 9).await, all);
    assert_eq!(page(all[0].number, all[3].number, 9).await, all[1..4]);
    assert_eq!(page(all[0].number, all[3].number, 2).await, all[1..3]);
    assert_eq!(page(all[4].number, i64::MAX, 9).await, []);
    assert_eq!(all[0].revoke_time, audit_context().now);
}

async fn revocations_are_purged_once_they_affect_no_token_and_numbers_are_not_reused(database: &Database) {
    let store = database.store().await;
    let store = store.as_ref();
    let user = sign_up_without_mail(database, store, "ada").await;
    for minutes in 0..3 {
        let token = log_in(store, &user).await;
        let logout = Logout { context: audit_context_at(NOW + minutes.minutes()), ..token.logout() };
        store.logout(logout).await.expect("the store");
    }
    let all = store.revocations(0, &[]).await.expect("the store");
    let second = all[1].retain_until;
    store.purge_revocations(second, i64::MAX, 100).await.expect("the store");
    assert_eq!(
        store.revocations(0, &[]).await.expect("the store"),
        all[1..],
        "a token may still be presented at that moment"
    );
    store.purge_revocations(second + 1.microseconds(), i64::MAX, 100).await.expect("the store");
    assert_eq!(store.revocations(0, &[]).await.expect("the store"), all[2..]);

    store.purge_revocations(second + 1.hours(), i64::MAX, 100).await.expect("the store");
    assert_eq!(
        store.revocations(0, &[]).await.expect("the store"),
        all[2..],
        "readers recognise the log by its newest"
    );
    log_out(store, &log_in(store, &user).await).await;
    let new = store.revocations(all[2].number, &[]).await.expect("the store");
    assert_eq!(new.len(), 1, "a reader of all earlier entries sees the new one");
}

/// An entry gets its number when it is written, and is visible when it is committed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_postgres_a_revocation_that_commits_late_is_found_by_its_number() {
    with_database(Engine::Postgres, async |database| {
        let store = database.store().await;
        let store = store.as_ref();
        let user = sign_up_without_mail(database, store, "ada").await;
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
        let numbers: Vec<_> = seen.iter().map(|entry| entry.number).collect();
        assert_eq!(numbers, [first + 2], "the entry with the higher number is visible first");
        assert_eq!(session_of(&seen[0]), token.grant.session_id);
        assert_eq!(
            store.revocations(first + 2, &[first + 1]).await.expect("the store"),
            [],
            "the first entry is not committed yet"
        );

        transaction.commit().await.expect("a commit");
        assert_eq!(
            store.revocations(first + 2, &[]).await.expect("the store"),
            [],
            "a reader that does not ask for the number misses the entry"
        );
        let found = store.revocations(first + 2, &[first + 1, first + 7]).await.expect("the store");
        assert_eq!(found.iter().map(session_of).collect::<Vec<_>>(), [late]);
        assert_eq!(found[0].number, first + 1);

        log_out(store, &log_in(store, &user).await).await;
        let both = store.revocations(first + 2, &[first + 1]).await.expect("the store");
        assert_eq!(both.iter().map(|entry| entry.number).collect::<Vec<_>>(), [first + 1, first + 3]);
    })
    .await;
}

/// Whether `listener` is notified of a revocation of `writer` within a second, in one of `tries`: at first it may not
/// listen yet.
async fn is_notified(writer: &dyn Store, user: &User, listener: &dyn Store, tries: usize) -> bool {
    for _ in 0..tries {
        log_out(writer, &log_in(writer, user).await).await;
        if tokio::time::timeout(Duration::from_secs(1), listener.revocation_written()).await.is_ok() {
            return true;
        }
    }
    false
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_postgres_listening_replicas_are_notified_of_each_others_revocations() {
    with_database(Engine::Postgres, async |database| {
        let writer = database.store().await;
        let user = sign_up_without_mail(database, writer.as_ref(), "ada").await;
        let listening = database.store().await;
        assert!(is_notified(writer.as_ref(), &user, listening.as_ref(), 20).await);
        let postern::database_url::DatabaseUrl::Postgres { url, max_connections, .. } = database.database() else {
            panic!("not PostgreSQL");
        };
        let without_notifications =
            postern::database_url::DatabaseUrl::Postgres { url, max_connections, notifications: false };
        let without_notifications =
            postern::store::connect(&without_notifications, postern::store::Migrate::Check).await.expect("a store");
        assert!(!is_notified(writer.as_ref(), &user, without_notifications.as_ref(), 2).await);
        for role in ["support", "user"] {
            // A change of roles notifies too.
            while tokio::time::timeout(Duration::from_millis(200), listening.revocation_written()).await.is_ok() {}
            let names = if role == "user" { vec!["user"] } else { vec![role, "user"] };
            writer.set_roles(user.id, crate::fixtures::roles(&names), audit_context()).await.expect("the store");
            let notified = tokio::time::timeout(Duration::from_secs(10), listening.revocation_written()).await;
            assert!(notified.is_ok(), "{role}");
        }
    })
    .await;
}
