"""Inserts many accounts at once by SQL, and reads the query plans of the database for a page of them.

It knows the columns of `users`. PostgreSQL logs the plan of each statement that the server sends (`auto_explain`).
SQLite cannot, so this module also knows the shape of the statements that list accounts.
"""

import json
import re
from pathlib import Path

from support.engine import Engine, Postgres
from support.wait import wait_until

# Ids in the order of their numbers: 16 digits, as bytes. The ids of real accounts are in another range.
_IDS = {
    "postgres": "encode(convert_to(lpad(n::text, 16, '0'), 'UTF8'), 'hex')::uuid",
    "sqlite": "CAST(printf('%016d', n) AS BLOB)",
}
NUMBERS = {
    "postgres": "generate_series({first}, {last}, {step}) AS numbers(n)",
    "sqlite": (
        "(WITH RECURSIVE series(n) AS "
        "(SELECT {first} UNION ALL SELECT n + {step} FROM series WHERE n + {step} <= {last}) SELECT n FROM series)"
    ),
}
LONG_AGO = {"postgres": "timestamptz '2023-11-14 22:13:20Z'", "sqlite": "1700000000000000"}


def insert(engine: Engine, first: int, last: int, step: int = 1, names: str = "crowd-") -> None:
    """Inserts accounts with these numbers. Their names and addresses begin alike, and nobody can log in to them."""
    id, then = _IDS[engine.name], LONG_AGO[engine.name]
    numbers = NUMBERS[engine.name].format(first=first, last=last, step=step)
    engine.execute(
        "INSERT INTO users (id, username, email, password_hash, create_time, update_time) "
        f"SELECT {id}, '{names}' || n, '{names}' || n || '@crowd.example', '!', {then}, {then} FROM {numbers}"
    )
    engine.execute(f"INSERT INTO user_roles (user_id, role) SELECT {id}, 'user' FROM {numbers}")


def delete(engine: Engine, first: int, last: int) -> None:
    ids = f"SELECT {_IDS[engine.name]} FROM {NUMBERS[engine.name].format(first=first, last=last, step=1)}"
    # This connection to SQLite does not cascade deletions.
    for table, column in (("user_roles", "user_id"), ("users", "id")):
        engine.execute(f"DELETE FROM {table} WHERE {column} IN ({ids})")


def settle_statistics(engine: Engine) -> None:
    """Updates the planner's statistics, as the database does by itself after a while."""
    engine.execute("ANALYZE")


# -- query plans of SQLite -----------------------------------------------------------------------------------------

_OF_USERS = "SELECT u.id, u.username, u.email FROM users u WHERE"
SQLITE_SHAPES = {
    "all, first page": "SELECT u.id, u.username, u.email FROM users u ORDER BY u.id LIMIT 201",
    "all, later page": f"{_OF_USERS} u.id > X'00' ORDER BY u.id LIMIT 201",
    "by email": f"{_OF_USERS} u.email > 'c' AND u.email >= 'c' AND u.email < 'd' ORDER BY u.email LIMIT 201",
    "by username": (
        f"{_OF_USERS} lower(u.username) > 'c' AND lower(u.username) >= 'c' AND lower(u.username) < 'd' "
        "AND NOT (u.email >= 'c' AND u.email < 'd') ORDER BY lower(u.username) LIMIT 201"
    ),
}


def sqlite_plan(engine: Engine, statement: str) -> str:
    return "; ".join(row[3] for row in engine.query(f"EXPLAIN QUERY PLAN {statement}"))


# -- query plans of PostgreSQL -------------------------------------------------------------------------------------


class Plans:
    """The plans of the statements that were sent to a database, read from the log of its cluster."""

    def __init__(self, engine: Postgres, log: Path):
        self._engine, self._log = engine, log
        self._start = log.stat().st_size

    def watch(self) -> None:
        """Makes PostgreSQL log the plans of all new connections."""
        settings = {
            "session_preload_libraries": "'auto_explain'",
            "auto_explain.log_min_duration": "0",
            "auto_explain.log_analyze": "on",
            "auto_explain.log_timing": "off",
            "auto_explain.log_format": "'json'",
        }
        for name, value in settings.items():
            self._engine.execute(f'ALTER DATABASE "{self._engine.database}" SET {name} = {value}')

    def of(self, marker: re.Pattern) -> list[dict]:
        """The plans of the statements that match, once there are any."""
        return wait_until("PostgreSQL logs plans", lambda: self._read(marker))

    def _read(self, marker: re.Pattern) -> list[dict]:
        with self._log.open("rb") as log:
            log.seek(self._start)
            text = log.read().decode(errors="replace")
        found = []
        for part in text.split("plan:\n")[1:]:
            # The continuation lines of a log entry begin with a tab.
            lines = part.split("\n")
            end = next((number for number, line in enumerate(lines) if not line.startswith("\t")), len(lines))
            plan = json.loads("\n".join(lines[:end]))
            if marker.search(plan["Query Text"]):
                found.append(plan)
        return found


def nodes(plan: dict) -> list[dict]:
    """Every node of a plan."""
    here = plan.get("Plan", plan)
    return [here, *(node for part in here.get("Plans", []) for node in nodes(part))]
