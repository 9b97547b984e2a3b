-- Service accounts, with which other services prove who they are, and their keys.

CREATE TABLE service_accounts (
    id          BLOB NOT NULL PRIMARY KEY,
    -- As the domain's rules have it: ASCII in lower case.
    name        TEXT NOT NULL UNIQUE,
    -- Separated by spaces.
    roles       TEXT NOT NULL,
    disabled    BOOLEAN NOT NULL DEFAULT FALSE,
    create_time INTEGER NOT NULL,
    update_time INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE service_keys (
    id                 BLOB NOT NULL PRIMARY KEY,
    service_account_id BLOB NOT NULL REFERENCES service_accounts (id) ON DELETE CASCADE,
    description        TEXT NOT NULL,
    -- SHA-256 of the secret.
    secret_hash        BLOB NOT NULL,
    create_time        INTEGER NOT NULL,
    -- Null: it does not expire.
    expire_time        INTEGER,
    -- Exact to the hour. Null: it was never used.
    last_use_time      INTEGER
) WITHOUT ROWID;
CREATE INDEX service_keys_account ON service_keys (service_account_id);
