"""Waiting for something to become true, with a deadline and a last word on what was seen."""

import time
from collections.abc import Callable


def wait_until(what: str, probe: Callable[[], object], deadline: float, pause: float = 0.05):
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
