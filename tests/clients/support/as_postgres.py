"""PostgreSQL and PgBouncer refuse to run as root: root runs them as the user `postgres`."""

import os
import pwd
import subprocess
from pathlib import Path


def as_postgres() -> dict:
    """The arguments of `subprocess` that run a program as that user, where this is root."""
    if os.geteuid() != 0:
        return {}
    account = pwd.getpwnam("postgres")
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def give_to_postgres(*paths: Path) -> None:
    """Makes that user the owner, where this is root."""
    if user := as_postgres():
        for path in paths:
            os.chown(path, user["user"], user["group"])


def start(command: list, directory: Path) -> subprocess.Popen:
    """Starts a server in a directory. Its output is in the file `log` there."""
    with (directory / "log").open("ab") as log:
        return subprocess.Popen(
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            **as_postgres(),
        )
