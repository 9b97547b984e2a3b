-- The schedule of the signing keys.

-- From when the key signs. Null: not decided yet, because the key was only just published. With publish_ahead_seconds null
-- too, a release without rotation made the key, and it has signed since create_time.
ALTER TABLE signing_keys ADD COLUMN sign_time INTEGER;
-- How long a key is published before it signs, by the settings of the process that made this one.
ALTER TABLE signing_keys ADD COLUMN publish_ahead_seconds INTEGER;
-- The first rotation comes one period after the upgrade.
UPDATE signing_keys SET sign_time = CAST(unixepoch('subsec') * 1000000 AS INTEGER);
