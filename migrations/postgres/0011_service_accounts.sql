-- Service accounts, with which other services prove who they are, and their keys.

CREATE TABLE service_accounts (
    id          uuid NOT NULL PRIMARY KEY,
    -- As the domain's rules have it: ASCII in lower case.
    name        text NOT NULL UNIQUE,
    -- Separated by spaces.
    roles       text NOT NULL,
    disabled    boolean NOT NULL DEFAULT false,
    create_time timestamptz NOT NULL,
    update_time timestamptz NOT NULL
);

CREATE TABLE service_keys (
    id                 uuid NOT NULL PRIMARY KEY,
    service_account_id uuid NOT NULL REFERENCES service_accounts (id) ON DELETE CASCADE,
    description        text NOT NULL,
    -- SHA-256 of the secret.
    secret_hash        bytea NOT NULL,
    create_time        timestamptz NOT NULL,
    -- Null: it does not expire.
    expire_time        timestamptz,
    -- Exact to the hour. Null: it was never used.
    last_use_time      timestamptz
);
CREATE INDEX service_keys_account ON service_keys (service_account_id);
