-- Accounts, their roles, their sessions, and the keys that sign access tokens.
-- Ids are 16-byte blobs; times are microseconds since the Unix epoch, in UTC.

CREATE TABLE users (
    id             BLOB    NOT NULL PRIMARY KEY,
    -- As typed; unique by its lower case (below). ASCII by the domain's rules.
    username       TEXT    NOT NULL,
    -- In its one canonical form.
    email          TEXT    NOT NULL,
    email_verified BOOLEAN NOT NULL DEFAULT FALSE,
    -- A PHC string.
    password_hash  TEXT    NOT NULL,
    -- Counts the changes of the password; a rehash is none.
    password_version INTEGER NOT NULL DEFAULT 0,
    disabled       BOOLEAN NOT NULL DEFAULT FALSE,
    create_time    INTEGER NOT NULL,
    update_time    INTEGER NOT NULL
) WITHOUT ROWID;
CREATE UNIQUE INDEX users_email ON users (email);
CREATE UNIQUE INDEX users_username ON users (lower(username));

CREATE TABLE user_roles (
    user_id BLOB NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    role    TEXT NOT NULL,
    PRIMARY KEY (user_id, role)
) WITHOUT ROWID;
CREATE INDEX user_roles_role ON user_roles (role);

-- One row for each session; a refresh updates it in place. No index covers a column that a refresh changes.
CREATE TABLE sessions (
    id                  BLOB    NOT NULL PRIMARY KEY,
    user_id             BLOB    NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    create_time         INTEGER NOT NULL,
    -- The absolute end, however often it is refreshed.
    end_time            INTEGER NOT NULL,
    -- When it was ended before its time.
    revoke_time         INTEGER,
    -- Why: 'logout', 'logout_everywhere' (asked by this session), 'ended_elsewhere' (by another), 'token_reused'.
    revoke_reason       TEXT,
    -- How often it was refreshed.
    generation          INTEGER NOT NULL,
    -- SHA-256 of its live refresh token.
    refresh_hash        BLOB    NOT NULL,
    refresh_issue_time  INTEGER NOT NULL,
    refresh_expire_time INTEGER NOT NULL,
    -- What the retry window is measured from.
    last_refresh_time   INTEGER NOT NULL,
    client_ip           TEXT,
    user_agent          TEXT
) WITHOUT ROWID;
CREATE INDEX sessions_user ON sessions (user_id);
CREATE INDEX sessions_end_time ON sessions (end_time);

CREATE TABLE signing_keys (
    -- RFC 7638 thumbprint of the public key.
    kid                TEXT    NOT NULL PRIMARY KEY,
    algorithm          TEXT    NOT NULL,
    -- PKCS#8, encrypted with AES-256-GCM under a key derived from the master key.
    sealed_private_key BLOB    NOT NULL,
    create_time        INTEGER NOT NULL
) WITHOUT ROWID;
