-- The schedule of the signing keys. A release without rotation keeps signing with the newest key that it knows.

-- From when the key signs. Null: not decided yet, because the key was only just published. With publish_ahead_seconds null
-- too, a release without rotation made the key, and it has signed since create_time.
ALTER TABLE signing_keys ADD COLUMN sign_time timestamptz;
-- How long a key is published before it signs, by the settings of the replica that made this one.
ALTER TABLE signing_keys ADD COLUMN publish_ahead_seconds bigint;
-- The first rotation comes one period after the upgrade: until then, replicas of the old release may be running, which would
-- not know the next key.
UPDATE signing_keys SET sign_time = clock_timestamp();
