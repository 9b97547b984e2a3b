-- How many notices about its account an address has had lately that nobody has verified. It may belong to somebody else.
CREATE TABLE notice_limits (
    email       TEXT    NOT NULL PRIMARY KEY,
    -- As in mail_limits.
    spent_until INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX notice_limits_spent_until ON notice_limits (spent_until);
