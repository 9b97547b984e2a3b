-- Attempts at a password that are reserved and not settled yet, apart from those that failed.

ALTER TABLE login_attempts ADD COLUMN under_way bigint NOT NULL DEFAULT 0;
-- When those that nobody has settled are forgotten.
ALTER TABLE login_attempts ADD COLUMN under_way_until timestamptz NOT NULL DEFAULT 'epoch';

-- Every login changes the time in it. Without it the new version of the row stays on its page; a purge reads the table.
DROP INDEX login_attempts_forget_time;
