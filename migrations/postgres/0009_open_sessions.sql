-- The open sessions of a user are counted at each login, and listed by page.
CREATE INDEX sessions_open ON sessions (user_id, id) WHERE revoke_time IS NULL;
