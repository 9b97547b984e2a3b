"""Waiting for something to become true, and saying what was seen last if it does not."""

import time
from collections.abc import Callable

# No test fails because its machine is slow: whatever is waited for has this many seconds. Where the product promises a
# time, a test demands the condition, and reports how long it took.
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
