"""Waits until a condition is true. On a timeout the error shows the last value."""

import time
from collections.abc import Callable

# The time for every condition in seconds, long enough that no test fails because its machine is slow. Where the product
# promises a shorter time, a test asserts the condition and reports how long it took.
PATIENCE = 60


def wait_until(what: str, probe: Callable[[], object], deadline: float = PATIENCE, pause: float = 0.05):
    """Calls `probe` until it returns something true, and returns that; fails after `deadline` seconds.

    An AssertionError of the probe counts as "not yet", and is shown if the deadline passes.
    """
    end = time.monotonic() + deadline
    while True:
        try:
            seen = probe()
            if seen:
                return seen
        except AssertionError as error:
            seen = error
        if time.monotonic() >= end:
            raise AssertionError(f"{what}: not within {deadline} s; last seen: {seen}")
        time.sleep(pause)
