-- How many notices about its account an address has had lately that nobody has verified. It may belong to somebody else.
CREATE TABLE notice_limits (
    email       text        PRIMARY KEY,
    -- As in mail_limits.
    spent_until timestamptz NOT NULL
);
CREATE INDEX notice_limits_spent_until ON notice_limits (spent_until);
