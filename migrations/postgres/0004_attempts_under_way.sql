-- Attempts at a password that are reserved and not settled yet, apart from those that failed.

ALTER TABLE login_attempts ADD COLUMN under_way bigint NOT NULL DEFAULT 0;
-- When those that nobody has settled are forgotten.
ALTER TABLE login_attempts ADD COLUMN under_way_until timestamptz NOT NULL DEFAULT 'epoch';
