-- The newest generation of a session of which an access token came back. Its client has received the refresh token of that
-- generation too, so the token before it has no more use.
ALTER TABLE sessions ADD COLUMN seen_generation bigint NOT NULL DEFAULT 0;
