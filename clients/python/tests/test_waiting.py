import asyncio

import pytest

from postern_client._waiting import Backoff, SingleFlight, Steps, run, run_async


def fails() -> int:
    raise ZeroDivisionError


def test_work_that_fails_fails_for_all_who_wait_and_is_begun_again() -> None:
    flight = SingleFlight(fails)

    def steps() -> Steps[int]:
        pending = flight.run()
        assert pending is not None
        yield pending
        return pending.result()

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            run(steps())
        with pytest.raises(ZeroDivisionError):
            asyncio.run(run_async(steps()))


def test_delays_double_up_to_a_bound_and_what_the_server_tells_counts() -> None:
    backoff = Backoff(first=1, most=4)
    for expected in (1, 2, 4, 4):
        assert expected <= backoff.next() <= expected * 1.5
    assert 10 <= backoff.next(10) <= 15
    backoff.reset()
    assert 1 <= backoff.next() <= 1.5
