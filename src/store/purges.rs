//! The statements that delete what can no longer matter. They differ between the dialects in how they pass by rows that
//! others have locked, and in whose clock ends an attempt.

/// The deletions in a dialect.
pub(super) struct Purges {
    /// At most `$2` of them, from before `$1`.
    pub sessions: &'static str,
    /// The same, each: tokens, and limits.
    pub mail: [&'static str; 4],
    /// The same.
    pub dead_mails: &'static str,
    /// The same.
    pub audit_events: &'static str,
    /// The attempts that no longer count at `$3`, with subjects after `$1` up to `$2`.
    pub attempts: &'static str,
}

/// Deletes at most `$2` rows of a table whose time is before `$1`. `$lock` passes by rows that another step has locked, for
/// the next purge: waiting for them while holding other locks could cause a deadlock.
macro_rules! purge {
    ($table:literal, $key:literal, $time:literal, $lock:literal) => {
        concat!(
            "DELETE FROM ",
            $table,
            " WHERE ",
            $key,
            " IN (SELECT ",
            $key,
            " FROM ",
            $table,
            " WHERE ",
            $time,
            " < $1 ORDER BY ",
            $time,
            " LIMIT $2",
            $lock,
            ")"
        )
    };
}
pub(super) use purge;

/// [`Purges`] of a dialect: what passes by locked rows, and the time that ends an attempt.
macro_rules! purges {
    ($lock:literal, $now:literal) => {
        Purges {
            sessions: purge!("sessions", "id", "end_time", $lock),
            mail: [
                purge!("one_time_tokens", "id", "expire_time", $lock),
                purge!("mail_limits", "email", "spent_until", $lock),
                purge!("reset_limits", "email", "spent_until", $lock),
                purge!("notice_limits", "email", "spent_until", $lock),
            ],
            dead_mails: purge!("mail_outbox", "id", "dead_time", $lock),
            audit_events: purge!("audit_events", "id", "create_time", $lock),
            attempts: concat!(
                "DELETE FROM login_attempts WHERE subject > $1 AND subject <= $2 AND forget_time < ",
                $now
            ),
        }
    };
}
pub(super) use purges;
