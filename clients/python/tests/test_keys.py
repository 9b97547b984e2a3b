import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from support import AUDIENCE, ISSUER, Clock, Mint, Stage, eventually, reason_of

from postern_client import KeySet, Verifier, discover_jwks_url


class Source:
    """Where the keys come from, with a count."""

    def __init__(self, *mints: Mint) -> None:
        self.mints, self.fetches, self.broken = list(mints), 0, False
        self.may_answer = threading.Event()
        self.may_answer.set()

    def __call__(self) -> dict[str, Any]:
        self.fetches += 1
        self.may_answer.wait()
        if self.broken:
            raise OSError("no network")
        return {"keys": [mint.jwk() for mint in self.mints]}


def verifier_of(source: Source, clock: Clock) -> Verifier:
    return Verifier(ISSUER, AUDIENCE, keys=KeySet(source, clock=clock))


def test_a_flood_of_unknown_keys_causes_one_fetch_per_cooldown(mint: Mint) -> None:
    source, clock = Source(mint), Clock()
    verifier = verifier_of(source, clock)
    verifier.verify(mint.token())
    flood = [Mint(f"unknown-{number}").token() for number in range(50)]
    for second in range(35):
        for token in flood:
            assert reason_of(lambda: verifier.verify(token)) == "TOKEN_INVALID"  # noqa: B023
        assert source.fetches == 1 + second // 10
        clock.now += 1
    assert verifier.verify(mint.token())


def test_a_new_key_is_found_and_one_that_is_not_published_any_more_is_refused(mint: Mint) -> None:
    source, clock, other = Source(mint), Clock(), Mint("key-2")
    verifier = verifier_of(source, clock)
    old = mint.token()
    verifier.verify(old)
    clock.now += 10
    source.mints = [other]
    assert verifier.verify(other.token())
    assert reason_of(lambda: verifier.verify(old)) == "TOKEN_INVALID", "it is remembered, and its key is gone"


def test_known_keys_are_fetched_again_after_five_minutes_in_the_background(mint: Mint) -> None:
    source, clock = Source(mint), Clock()
    verifier, token = verifier_of(source, clock), mint.token()
    verifier.verify(token)
    clock.now += 299
    verifier.verify(token)
    assert source.fetches == 1
    clock.now += 1
    source.mints = [Mint("key-2")]
    source.may_answer.clear()
    verifier.verify(token)  # does not wait
    eventually(lambda: source.fetches == 2)
    verifier.verify(token)
    source.may_answer.set()
    eventually(lambda: refused(verifier, token))
    assert source.fetches == 2


def refused(verifier: Verifier, token: str) -> bool:
    try:
        verifier.verify(token)
    except Exception:
        return True
    return False


def test_a_fetch_that_fails_keeps_the_keys_and_counts_for_the_cooldown(mint: Mint) -> None:
    source, clock = Source(mint), Clock()
    verifier, token = verifier_of(source, clock), mint.token()
    verifier.verify(token)
    source.broken = True
    clock.now += 300
    for _ in range(20):
        assert verifier.verify(token)
    eventually(lambda: source.fetches == 2)
    for _ in range(20):
        assert verifier.verify(token)
    assert source.fetches == 2
    # Whether the key of this one is published is not known.
    assert reason_of(lambda: verifier.verify(Mint("key-2").token())) == "STORE_UNAVAILABLE"
    assert source.fetches == 2
    source.broken = False
    clock.now += 10
    assert reason_of(lambda: verifier.verify(Mint("key-2").token())) == "TOKEN_INVALID"
    assert source.fetches == 3


def test_without_any_keys_it_is_unavailable_until_they_can_be_fetched(mint: Mint) -> None:
    source, clock = Source(mint), Clock()
    source.broken = True
    verifier, token = verifier_of(source, clock), mint.token()
    for _ in range(5):
        assert reason_of(lambda: verifier.verify(token)) == "STORE_UNAVAILABLE"
    assert source.fetches == 1
    source.broken = False
    clock.now += 10
    assert verifier.verify(token)


def test_keys_of_other_kinds_are_skipped_and_a_set_without_ours_is_a_failure(mint: Mint) -> None:
    others: list[dict[str, Any]] = [
        {"kty": "RSA", "kid": "r", "n": "AQAB", "e": "AQAB"},
        {**mint.jwk(), "kid": "enc", "use": "enc"},
        {**mint.jwk(), "kid": "alg", "alg": "ES384"},
        {**mint.jwk(), "kid": "point", "x": "AAAA"},
        {**mint.jwk(), "kid": 7},
    ]
    keys = KeySet(lambda: {"keys": [*others, mint.jwk()]})
    assert Verifier(ISSUER, AUDIENCE, keys=keys).verify(mint.token())
    assert not any(keys.knows(kid) for kid in ("r", "enc", "alg", "point"))
    documents: list[dict[str, Any]] = [{"keys": others}, {"keys": []}, {}, {"keys": None}]
    for document in documents:
        verifier = Verifier(ISSUER, AUDIENCE, keys=KeySet(lambda: document))  # noqa: B023
        assert reason_of(lambda: verifier.verify(mint.token())) == "STORE_UNAVAILABLE"  # noqa: B023


@contextmanager
def serving(answers: dict[str, Callable[[], tuple[int, dict[str, str], bytes]]]) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = answers[self.path]()
            self.send_response(status)
            for header in headers.items():
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def test_keys_come_from_the_issuer_and_a_redirect_is_not_followed(mint: Mint) -> None:
    body = json.dumps(mint.jwks()).encode()
    paths = {
        "/.well-known/jwks.json": lambda: (200, {}, body),
        "/moved": lambda: (302, {"location": "/.well-known/jwks.json"}, b""),
        "/no-json": lambda: (200, {}, b"<html>"),
        "/list": lambda: (200, {}, b"[]"),
        "/error": lambda: (500, {}, body),
    }
    with serving(paths) as url:
        token = mint.token(iss=url)
        assert Verifier(url, AUDIENCE).verify(token)
        for path in ("/moved", "/no-json", "/list", "/error"):
            verifier = Verifier(url, AUDIENCE, keys=KeySet.at(url + path))
            assert reason_of(lambda: verifier.verify(token)) == "STORE_UNAVAILABLE", path  # noqa: B023
    for wrong in ("file:///etc/passwd", "ftp://example.com/keys", "example.com"):
        with pytest.raises(ValueError, match="https"):
            KeySet.at(wrong)


def test_the_real_server_says_where_its_keys_are(stage: Stage) -> None:
    url = discover_jwks_url(stage.issuer)
    verifier = Verifier(stage.issuer, stage.audience, keys=KeySet.at(url))
    assert verifier.verify(stage.account()["accessToken"])
    with pytest.raises(ValueError, match="is not the configuration"):
        discover_jwks_url(stage.issuer + "/")
