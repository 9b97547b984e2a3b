-- Usernames are ASCII, and one name whatever their case. With lower() in the database's locale that depended on the locale:
-- in Turkish, lower('I') is another letter than 'i'.
DROP INDEX users_username;
DROP INDEX users_username_prefix;
CREATE UNIQUE INDEX users_username ON users (lower(username COLLATE "C"));
