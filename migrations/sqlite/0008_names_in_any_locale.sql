-- Nothing to do: lower() of SQLite knows ASCII only. The PostgreSQL migration with this number has the reason.
SELECT 1;
