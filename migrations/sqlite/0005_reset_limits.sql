-- How many mails for a reset an address has had lately. Where mail_limits has no room, a few are sent all the same, so that
-- other mails cannot spend what the owner of the address needs to get in again.
CREATE TABLE reset_limits (
    email       TEXT    NOT NULL PRIMARY KEY,
    -- As in mail_limits.
    spent_until INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX reset_limits_spent_until ON reset_limits (spent_until);
