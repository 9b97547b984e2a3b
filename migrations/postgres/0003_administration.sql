-- What was done to accounts, what access tokens are dead before their time, and who guesses passwords.

-- Written in the transaction of what it tells. Nothing refers to it and it refers to nothing: it outlives accounts.
CREATE TABLE audit_events (
    -- A UUIDv7: in the order in which things happened.
    id          uuid        PRIMARY KEY,
    create_time timestamptz NOT NULL,
    action      text        NOT NULL,
    actor_id    uuid,
    user_id     uuid,
    session_id  uuid,
    client_ip   text,
    detail      text
);
CREATE INDEX audit_events_user ON audit_events (user_id, id);
CREATE INDEX audit_events_action ON audit_events (action, id);
CREATE INDEX audit_events_create_time ON audit_events (create_time);

-- Sessions that ended, and accounts whose roles changed, for as long as access tokens from before may be presented. Every
-- replica reads this log into memory. Numbers are given when a row is written and seen when it is committed, so a reader
-- has to come back for those that it skipped.
CREATE TABLE revocations (
    number      bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- The session that ended; or else
    session_id  uuid,
    -- the account whose roles changed,
    user_id     uuid,
    -- and its roles since, separated by spaces.
    roles       text,
    revoke_time timestamptz NOT NULL,
    -- When the last access token from before has expired.
    forget_time timestamptz NOT NULL
);
CREATE INDEX revocations_forget_time ON revocations (forget_time);

-- Guesses at the passwords of addresses, of unknown ones too.
CREATE TABLE login_attempts (
    -- A keyed hash of the address: whatever somebody typed is not kept.
    subject       bytea       PRIMARY KEY,
    -- In a row, the ones under way among them.
    failures      bigint      NOT NULL,
    -- Until when no further one is let through.
    blocked_until timestamptz NOT NULL,
    -- When it is as if there had been none.
    forget_time   timestamptz NOT NULL
);
CREATE INDEX login_attempts_forget_time ON login_attempts (forget_time);

-- Accounts by what their address or name begins with: in the order of bytes, which a prefix is a range of.
CREATE INDEX users_email_prefix ON users (email COLLATE "C");
CREATE INDEX users_username_prefix ON users (lower(username) COLLATE "C");
