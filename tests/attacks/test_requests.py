"""Attacks with whole requests that cost more than they look: a few clients keep no core from everybody else."""

import concurrent.futures
import functools
import json
import time

import pytest
from bystander import ATTACKER, Bystander
from support.client import Person
from support.http import address_of
from wire import http1

SECONDS = 4
AT_ONCE = 8
# A password with many letters that could stand for others: zxcvbn takes long over it.
HOSTILE = "4@8({[<369!1|0$5+7%2" * 5


@functools.cache
def many_unknown_fields() -> bytes:
    """A body of almost 64 KiB with thousands of fields that the contract does not have."""
    return json.dumps({f"{number:x}": 0 for number in range(6_000)}).encode()[: 65_000].rsplit(b",", 1)[0] + b"}"


def hostile_sign_up() -> bytes:
    person = Person()
    fields = {"username": person.username, "email": person.email, "password": HOSTILE}
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    "what, path, body",
    [
        ("bodies with unknown fields", "/v1/auth/login", many_unknown_fields),
        ("passwords that are slow to judge", "/v1/auth/signup", hostile_sign_up),
    ],
)
def test_requests_that_cost_more_than_they_look(start_server, embedded, what, path, body):
    server = start_server(embedded, login_limit_per_client="0", sign_up_limit_per_client="0")
    bystander = Bystander(server)
    address = address_of(server, "http_addr")
    end = time.monotonic() + SECONDS + 1

    def go_on() -> None:
        while time.monotonic() < end:
            request = body()
            answer = http1(address, path, request, source=ATTACKER)
            assert len(answer) <= len(request) + 8 * 1024

    with bystander.watching(what) as look, concurrent.futures.ThreadPoolExecutor(AT_ONCE) as attackers:
        attacks = [attackers.submit(go_on) for _ in range(AT_ONCE)]
        while time.monotonic() < end:
            look()
            time.sleep(0.1)
        for attack in attacks:
            attack.result()
    assert bystander.grown < 120
