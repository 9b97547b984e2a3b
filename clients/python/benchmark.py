"""Prints how many checks a second one core does: of remembered tokens, with revocations, and of tokens seen first.

target/clients/python/venv/bin/python clients/python/benchmark.py
"""

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path

from postern.auth.v1.token_service_pb2 import Heartbeat, SessionEnded, WatchRevocationsResponse

from postern_client import Demand, KeySet, RevocationState, Verifier
from postern_client._waiting import run
from postern_client.demands import authorize

sys.path.insert(0, str(Path(__file__).parent / "tests"))
from support import AUDIENCE, ISSUER, Mint, timestamp  # noqa: E402

TOKENS, REVOKED, SECONDS = 1_000, 10_000, 2.0


def rate(check: Callable[[int], object]) -> float:
    """Calls a second, over some seconds of processor time."""
    began, calls = time.process_time(), 0
    while time.process_time() - began < SECONDS:
        for _ in range(100):
            check(calls)
            calls += 1
    return calls / (time.process_time() - began)


def main() -> None:
    mint, state = Mint(), RevocationState(when_unknown="refuse", max_staleness=600)
    for number in range(REVOKED):
        message = WatchRevocationsResponse(session_ended=SessionEnded(session_id=f"session-{number}"))
        message.forget_time.CopyFrom(timestamp(time.time() + 900))
        state.apply(message)
    state.apply(WatchRevocationsResponse(heartbeat=Heartbeat(complete_time=timestamp(time.time()))))
    verifier = Verifier(ISSUER, AUDIENCE, keys=KeySet(mint.jwks), revocations=state)
    tokens = [mint.token() for _ in range(TOKENS)]
    headers = [[f"Bearer {token}"] for token in tokens]
    demand = Demand.user(role="user")
    forgetful = Verifier(ISSUER, AUDIENCE, keys=KeySet(mint.jwks), revocations=state, cache_size=1)

    # Each text is a new object, as it is when it comes out of a request.
    checks: dict[str, Callable[[int], object]] = {
        "remembered": lambda call: verifier.verify(f"{tokens[call % TOKENS]}"),
        "remembered, with a demand": lambda call: run(authorize(verifier, demand, headers[call % TOKENS])),
        "first seen": lambda call: forgetful.verify(tokens[call % TOKENS]),
    }
    for name, check in checks.items():
        print(f"{name}: {rate(check):,.0f} checks/s")

    async def in_a_loop() -> float:
        began, calls = time.process_time(), 0
        while time.process_time() - began < SECONDS:
            await verifier.verify_async(tokens[calls % TOKENS])
            calls += 1
        return calls / (time.process_time() - began)

    print(f"remembered, asyncio: {asyncio.run(in_a_loop()):,.0f} checks/s")


if __name__ == "__main__":
    main()
