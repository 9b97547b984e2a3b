"""Checks many rows in one test, where a separate test for each row would cost more than the check."""

from collections.abc import Callable, Iterable


def check_all(rows: Iterable, check: Callable[[object], object]) -> None:
    """Checks every row, also after one has failed, and then names all that failed."""
    failures, count = [], 0
    for row in rows:
        count += 1
        try:
            check(row)
        except AssertionError as failure:
            failures.append(f"{row!a}: {failure}"[:1000])
    assert count, "there is no row to check"
    assert not failures, f"{len(failures)} of {count} rows failed:\n" + "\n".join(failures)
