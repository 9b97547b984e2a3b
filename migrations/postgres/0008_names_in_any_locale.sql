-- Usernames are ASCII, and one name whatever their case. With lower() in the database's locale that depended on the locale:
-- in Turkish, lower('I') is another letter than 'i'.
DO $$
DECLARE
    doubled text;
BEGIN
    SELECT string_agg(names, '; ') INTO doubled FROM (
        SELECT string_agg(username, ', ' ORDER BY create_time) AS names
        FROM users GROUP BY lower(username COLLATE "C") HAVING count(*) > 1
    ) AS pairs;
    IF doubled IS NOT NULL THEN
        RAISE EXCEPTION 'these usernames differ only in case, and only one of each can stay: %', doubled
            USING HINT = 'Rename the others, for example: UPDATE users SET username = ''ada-2'' WHERE username = ''Ada''';
    END IF;
END $$;
DROP INDEX users_username;
DROP INDEX users_username_prefix;
CREATE UNIQUE INDEX users_username ON users (lower(username COLLATE "C"));
