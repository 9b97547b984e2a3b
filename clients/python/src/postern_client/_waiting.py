"""Waiting: how one copy of the rules serves threads and asyncio.

A rule that may have to wait is a generator of futures, :data:`Steps`. A thread waits for each with :func:`run`, a
coroutine with :func:`run_async`. The work behind the futures is done by threads of its own, so a caller who gives up
cancels nothing.
"""

import asyncio
import random
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Steps = Generator["Future[Any]", None, T]


def run(steps: Steps[T]) -> T:
    """Takes the steps, and blocks this thread where they wait."""
    try:
        while True:
            next(steps).result()
    except StopIteration as end:
        result: T = end.value
        return result


async def run_async(steps: Steps[T]) -> T:
    """The same for a coroutine."""
    # StopIteration cannot leave a coroutine, and a future could raise one: the steps are taken outside of the waiting.
    while True:
        try:
            pending = next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
        await asyncio.wrap_future(pending)


def pending_future() -> "Future[Any]":
    """A future that those who wait for it cannot cancel."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


class SingleFlight(Generic[T]):
    """Work that is done once for all who ask for it meanwhile."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work, self._lock = work, threading.Lock()
        self._running: Future[T] | None = None
        self._worker: threading.Thread | None = None

    def run(self, is_due: Callable[[], bool] = lambda: True) -> "Future[T] | None":
        """The work that is being done. If there is none it is begun, or `None` is returned if it is not due."""
        with self._lock:
            if self._worker is threading.current_thread():
                raise RuntimeError("it would wait for itself: renew tokens on a channel without their interceptor")
            if self._running is None and is_due():
                future = pending_future()
                worker = threading.Thread(target=self._do, args=(future,), name="postern-client", daemon=True)
                worker.start()
                self._running, self._worker = future, worker
            return self._running

    def _do(self, future: "Future[T]") -> None:
        try:
            result = self._work()
        except BaseException as error:
            self._end()
            future.set_exception(error)
        else:
            self._end()
            future.set_result(result)

    def _end(self) -> None:
        with self._lock:
            self._running = self._worker = None


class Backoff:
    """Delays in seconds that double from `first` to `most`, each with up to a half more as jitter."""

    def __init__(self, first: float, most: float) -> None:
        self._first, self._most, self._delay = first, most, first

    def next(self, told: float | None = None) -> float:
        """The next delay: what the server has told, or else the next in the row."""
        delay = self._delay if told is None else told
        self._delay = min(self._delay * 2, self._most)
        return delay * random.uniform(1.0, 1.5)

    def reset(self) -> None:
        """Begins again with `first`."""
        self._delay = self._first
