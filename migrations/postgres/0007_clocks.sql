-- When the newest access token of a session was minted, by the clock of whoever minted it. That clock may have been ahead, so
-- this can be later than refresh_issue_time, and a revocation is kept for as long as that token can be presented. Null: it
-- is refresh_issue_time.
ALTER TABLE sessions ADD COLUMN newest_token_time timestamptz;
