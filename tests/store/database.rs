//! Direct access to the database, past the store: what tests read and change there, the same on every engine.

use std::time::Duration;

use postern::domain::ids::UserId;
use uuid::Uuid;

use crate::{
    fixtures::Token,
    support::{Database, Engine},
};

impl Database {
    /// An id as an SQL literal.
    pub fn id(&self, id: Uuid) -> String {
        match self.engine {
            Engine::Sqlite => format!("x'{}'", id.simple()),
            Engine::Postgres => format!("'{id}'::uuid"),
        }
    }

    /// The row of a session, as one text.
    pub async fn session_row(&self, token: &Token) -> String {
        let columns = "id user_id create_time end_time revoke_time generation refresh_hash refresh_issue_time \
                       refresh_expire_time last_refresh_time client_ip user_agent";
        let columns: Vec<_> = columns
            .split_whitespace()
            .map(|column| match self.engine {
                Engine::Sqlite => format!("quote({column})"),
                Engine::Postgres => format!("quote_nullable({column}::text)"),
            })
            .collect();
        let id = self.id(token.grant.session_id.0);
        self.sql.text(&format!("SELECT {} FROM sessions WHERE id = {id}", columns.join(" || ', ' || "))).await
    }

    /// How many sessions match `condition`.
    pub async fn sessions_where(&self, condition: &str) -> i64 {
        self.sql.number(&format!("SELECT count(*) FROM sessions WHERE {condition}")).await
    }

    /// Whether a session was revoked.
    pub async fn is_revoked(&self, token: &Token) -> bool {
        let id = self.id(token.grant.session_id.0);
        self.sessions_where(&format!("id = {id} AND revoke_time IS NOT NULL")).await == 1
    }

    /// Changes a user's row.
    pub async fn set_user(&self, user: UserId, assignment: &str) {
        let id = self.id(user.0);
        let changed = self.sql.execute(&format!("UPDATE users SET {assignment} WHERE id = {id}")).await;
        assert_eq!(changed, 1, "{assignment}");
    }

    pub async fn add_role(&self, user: UserId, role: &str) {
        let id = self.id(user.0);
        self.sql.execute(&format!("INSERT INTO user_roles (user_id, role) VALUES ({id}, '{role}')")).await;
    }

    /// Makes a session's last rotation older, by the clock with which its engine measures the retry window.
    pub async fn age_rotation(&self, token: &Token, by: Duration) {
        let id = self.id(token.grant.session_id.0);
        let earlier = match self.engine {
            Engine::Sqlite => format!("last_refresh_time - {}", by.as_micros()),
            Engine::Postgres => format!("last_refresh_time - interval '{} microseconds'", by.as_micros()),
        };
        self.sql.execute(&format!("UPDATE sessions SET last_refresh_time = {earlier} WHERE id = {id}")).await;
    }

    /// The contents of every table that steps write, as one text.
    pub async fn everything(&self) -> String {
        let mut everything = String::new();
        let tables = "users user_roles sessions mail_outbox one_time_tokens mail_limits reset_limits notice_limits \
                      audit_events revocations login_attempts service_accounts service_keys";
        for table in tables.split_whitespace() {
            everything.push_str(&self.rows_of(table).await.join("\n"));
        }
        everything
    }

    /// All rows of a table, one text per row, sorted.
    pub async fn rows_of(&self, table: &str) -> Vec<String> {
        let row = match self.engine {
            Engine::Sqlite => {
                let columns = "SELECT string_agg('quote(' || name || ')', ' || '' '' || ')";
                self.sql.text(&format!("{columns} FROM pragma_table_info('{table}')")).await
            }
            Engine::Postgres => format!("{table}::text"),
        };
        self.rows_as_text(&row, table).await
    }

    /// One text per row, sorted.
    async fn rows_as_text(&self, row: &str, table: &str) -> Vec<String> {
        let joined = self.sql.text(&format!("SELECT coalesce(string_agg({row}, '\n'), '') FROM {table}")).await;
        let mut rows: Vec<_> = joined.lines().map(str::to_owned).collect();
        rows.sort();
        rows
    }

    /// Every mail in the outbox, waiting or dead, as `kind to recipient`.
    pub async fn outbox(&self) -> Vec<String> {
        self.rows_as_text("kind || ' to ' || recipient", "mail_outbox").await
    }

    /// Every one-time token, as `purpose of address`.
    pub async fn tokens(&self) -> Vec<String> {
        self.rows_as_text("purpose || ' of ' || email", "one_time_tokens").await
    }

    /// Moves the next attempt of every mail in the outbox to an earlier time.
    pub async fn age_mails(&self, by: Duration) {
        let earlier = match self.engine {
            Engine::Sqlite => format!("next_attempt_time - {}", by.as_micros()),
            Engine::Postgres => format!("next_attempt_time - interval '{} microseconds'", by.as_micros()),
        };
        self.sql.execute(&format!("UPDATE mail_outbox SET next_attempt_time = {earlier}")).await;
    }

    pub async fn delete_user(&self, user: UserId) {
        let id = self.id(user.0);
        assert_eq!(self.sql.execute(&format!("DELETE FROM users WHERE id = {id}")).await, 1);
    }

    /// How many sessions have ended, by the log of revocations.
    pub async fn revocations(&self) -> i64 {
        self.sql.number("SELECT count(*) FROM revocations WHERE session_id IS NOT NULL").await
    }

    /// Why a session was revoked; empty if it was not.
    pub async fn revoke_reason(&self, token: &Token) -> String {
        let id = self.id(token.grant.session_id.0);
        self.sql.text(&format!("SELECT coalesce(revoke_reason, '') FROM sessions WHERE id = {id}")).await
    }

    /// How many enabled admins there are.
    pub async fn enabled_admins(&self) -> i64 {
        let admins = "SELECT count(*) FROM users u JOIN user_roles r ON r.user_id = u.id";
        self.sql.number(&format!("{admins} WHERE r.role = 'admin' AND NOT u.disabled")).await
    }

    /// Moves the times of every counted attempt to earlier ones.
    pub async fn age_attempts(&self, by: Duration) {
        self.move_attempts('-', by).await;
    }

    /// Moves the times of every counted attempt to later ones, as a clock that is ahead writes them.
    pub async fn postpone_attempts(&self, by: Duration) {
        self.move_attempts('+', by).await;
    }

    async fn move_attempts(&self, sign: char, by: Duration) {
        let moved = |column: &str| match self.engine {
            Engine::Sqlite => format!("{column} = {column} {sign} {}", by.as_micros()),
            Engine::Postgres => format!("{column} = {column} {sign} interval '{} microseconds'", by.as_micros()),
        };
        let columns = ["blocked_until", "forget_time", "under_way_until"].map(moved).join(", ");
        self.sql.execute(&format!("UPDATE login_attempts SET {columns}")).await;
    }
}
