-- Accounts, their roles, their sessions, and the keys that sign access tokens.

CREATE TABLE users (
    id             uuid        PRIMARY KEY,
    -- As typed; unique by its lower case (below). ASCII by the domain's rules.
    username       text        NOT NULL,
    -- In its one canonical form.
    email          text        NOT NULL,
    email_verified boolean     NOT NULL DEFAULT false,
    -- A PHC string.
    password_hash  text        NOT NULL,
    -- Counts the changes of the password; a rehash is none.
    password_version bigint    NOT NULL DEFAULT 0,
    disabled       boolean     NOT NULL DEFAULT false,
    create_time    timestamptz NOT NULL,
    update_time    timestamptz NOT NULL
);
CREATE UNIQUE INDEX users_email ON users (email);
CREATE UNIQUE INDEX users_username ON users (lower(username));

CREATE TABLE user_roles (
    user_id uuid NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    role    text NOT NULL,
    PRIMARY KEY (user_id, role)
);
CREATE INDEX user_roles_role ON user_roles (role);

-- One row for each session; a refresh updates it in place. No index covers a column that a refresh changes, and the
-- spare room keeps the new version on its page, so that every such update is a heap-only one.
CREATE TABLE sessions (
    id                  uuid        PRIMARY KEY,
    user_id             uuid        NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    create_time         timestamptz NOT NULL,
    -- The absolute end, however often it is refreshed.
    end_time            timestamptz NOT NULL,
    -- When it was ended before its time.
    revoke_time         timestamptz,
    -- Why: 'logout', 'logout_everywhere' (asked by this session), 'ended_elsewhere' (by another), 'token_reused'.
    revoke_reason       text,
    -- How often it was refreshed.
    generation          bigint      NOT NULL,
    -- SHA-256 of its live refresh token.
    refresh_hash        bytea       NOT NULL,
    refresh_issue_time  timestamptz NOT NULL,
    refresh_expire_time timestamptz NOT NULL,
    -- By this database's clock: what the retry window is measured from.
    last_refresh_time   timestamptz NOT NULL,
    client_ip           text,
    user_agent          text
) WITH (fillfactor = 80);
CREATE INDEX sessions_user ON sessions (user_id);
CREATE INDEX sessions_end_time ON sessions (end_time);

CREATE TABLE signing_keys (
    -- RFC 7638 thumbprint of the public key.
    kid                text        PRIMARY KEY,
    algorithm          text        NOT NULL,
    -- PKCS#8, encrypted with AES-256-GCM under a key derived from the master key.
    sealed_private_key bytea       NOT NULL,
    create_time        timestamptz NOT NULL
);
