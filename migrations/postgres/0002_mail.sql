-- Mail that is still to be sent, and the one-time tokens that mails carry.

-- A row joins the transaction of whatever causes the mail, and is deleted when the mail was handed over. It holds no
-- token: that is an HMAC over its row in one_time_tokens, computed when the mail is sent.
CREATE TABLE mail_outbox (
    id                uuid        PRIMARY KEY,
    -- What it says: 'verify_email', 'reset_password', and so on (MailKind).
    kind              text        NOT NULL,
    recipient         text        NOT NULL,
    -- Whose mail it is; null where it was asked for by the address alone.
    user_id           uuid        REFERENCES users (id) ON DELETE CASCADE,
    -- The address that is changed to, where it is about that.
    new_email         text,
    create_time       timestamptz NOT NULL,
    -- When it is due, by this database's clock. Whoever claims it puts this off for as long as the claim holds.
    next_attempt_time timestamptz NOT NULL,
    -- How often it was claimed.
    attempts          bigint      NOT NULL DEFAULT 0,
    -- When it was given up.
    dead_time         timestamptz
);
CREATE INDEX mail_outbox_due ON mail_outbox (next_attempt_time) WHERE dead_time IS NULL;
CREATE INDEX mail_outbox_user ON mail_outbox (user_id);
CREATE INDEX mail_outbox_recipient ON mail_outbox (recipient);

-- At most one live token for each purpose of an account: a newer one takes the row. A used one is deleted.
CREATE TABLE one_time_tokens (
    -- The id of the mail that carries it.
    id          uuid        PRIMARY KEY,
    user_id     uuid        NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    -- 'verify_email', 'reset_password' or 'change_email'.
    purpose     text        NOT NULL,
    -- The address that it was mailed to.
    email       text        NOT NULL,
    -- When its mail was asked for.
    create_time timestamptz NOT NULL,
    expire_time timestamptz NOT NULL,
    UNIQUE (user_id, purpose)
);
CREATE INDEX one_time_tokens_expire_time ON one_time_tokens (expire_time);

-- How much mail an address has had lately that somebody else can cause (GCRA).
CREATE TABLE mail_limits (
    email       text        PRIMARY KEY,
    -- Until when what it has had counts: the theoretical arrival time of the next one.
    spent_until timestamptz NOT NULL
);
CREATE INDEX mail_limits_spent_until ON mail_limits (spent_until);
