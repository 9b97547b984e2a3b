import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from postern.auth.v1.token_service_pb2 import SessionEnded, WatchRevocationsResponse
from support import AUDIENCE, ISSUER, Clock, Counter, Mint, Stage, b64, reason_of, timestamp

from postern_client import Caller, KeySet, PosternError, RevocationState, TokenSource, Verifier, _jwt, open_channel


def verifier_of(mint: Mint, **options: Any) -> Verifier:
    return Verifier(ISSUER, AUDIENCE, keys=KeySet(mint.jwks), **options)


def test_the_caller_is_what_the_token_says(mint: Mint) -> None:
    claims = mint.claims()
    caller = verifier_of(mint).verify(mint.sign(json.dumps(mint.header()), json.dumps(claims)))
    assert (caller.subject, caller.session_id, caller.token_id) == (claims["sub"], claims["sid"], claims["jti"])
    assert (caller.subject_type, caller.client_id, caller.username) == ("user", "postern", "ada")
    assert (caller.email, caller.email_verified, caller.roles) == ("ada@example.com", True, ("user",))
    assert caller.expire_time.timestamp() == claims["exp"]
    service = verifier_of(mint).verify(mint.service_token(roles=["admin"]))
    assert (service.subject_type, service.email, service.email_verified) == ("service", None, None)
    assert service.client_id == service.subject
    assert service.has_role("admin")


def test_a_token_without_a_kind_is_a_persons(mint: Mint) -> None:
    assert verifier_of(mint).verify(mint.token(subject_type=..., gen=...)).subject_type == "user"


def members(object: dict[str, Any], extra: str) -> str:
    return json.dumps(object)[:-1] + f",{extra}}}"


def test_only_the_exact_header_is_accepted(mint: Mint) -> None:
    verifier, payload = verifier_of(mint), json.dumps(mint.claims())
    header = mint.header()
    assert verifier.verify(mint.sign(json.dumps(header), payload))
    changed = [
        *({**header, "typ": typ} for typ in ("JWT", "AT+JWT", "rt+jwt", "application/at+jwt", None, ["at+jwt"])),
        *({**header, "alg": alg} for alg in ("none", "es256", "HS256", "ES384", None)),
        *({**header, "kid": kid} for kid in ("", "other", None, 1, ["key-1"])),
        *({name: value for name, value in header.items() if name != left} for left in header),
        *({**header, name: 1} for name in ("crit", "b64", "cty", "zip", "jku", "jwk", "x5u", "x5c", "")),
    ]
    texts = [json.dumps(each) for each in changed]
    texts += [members(header, f'"{name}":"{value}"') for name, value in header.items()]  # a member that appears twice
    texts += ["", "null", "[]", "{}", "\ufeff" + json.dumps(header), json.dumps(list(header.items()))]
    for text in texts:
        assert reason_of(lambda: verifier.verify(mint.sign(text, payload))) == "TOKEN_INVALID", text  # noqa: B023


def test_only_well_formed_claims_are_accepted(mint: Mint) -> None:
    verifier, header = verifier_of(mint), json.dumps(mint.header())
    now = int(time.time())
    changes: dict[str, list[Any]] = {
        "iss": [ISSUER + "/", ISSUER.upper(), [ISSUER], None, ...],
        "aud": ["other", [AUDIENCE], [], "", None, ...],
        "sub": ["", "ada", 7, None, ...],
        "sid": ["", "ada", 7, None, ...],
        "jti": [7, None, ...],
        "client_id": [7, None, ...],
        "username": [7, [], None, "\ud800", ...],
        "exp": [str(now + 900), now + 900.5, float(now + 900), True, 2**63, None, ...],
        "iat": [str(now), float(now), True, None, ..., now + 3600],
        "roles": ["user", [1], ["Admin"], [""], {}, {"user": 1}, ["user\n"], None, ...],
        "email": [7, [], None, ...],
        "email_verified": ["true", 1, None, ...],
        "subject_type": ["User", "device", None, 1, "service"],
        "gen": ["0", None, 0.0],
    }
    for name, values in changes.items():
        for value in values:
            text = json.dumps(mint.claims(**{name: value}))
            assert reason_of(lambda: verifier.verify(mint.sign(header, text))) == "TOKEN_INVALID", text  # noqa: B023
    twice = [members(mint.claims(), f'"{name}":{json.dumps(value)}') for name, value in mint.claims().items()]
    odd = ["", "null", "[]", "{}", json.dumps([mint.claims()]), members(mint.claims(), '"x":NaN')]
    for text in twice + odd:
        assert reason_of(lambda: verifier.verify(mint.sign(header, text))) == "TOKEN_INVALID", text  # noqa: B023
    for changed in ({"email": "a@b.c", "email_verified": True}, {"client_id": "postern"}, {"jti": "x"}):
        assert reason_of(lambda: verifier.verify(mint.service_token(**changed))) == "TOKEN_INVALID", changed  # noqa: B023
    assert verifier.verify(mint.token(acr="1", roles=[], extra={"a": 1}))
    # Deeper than the parser of JSON of some versions of Python can go.
    deep = json.dumps(mint.header())[:-1] + ',"x":' + "[" * 2000 + "]" * 2000 + "}"
    assert reason_of(lambda: verifier.verify(mint.sign(deep, "{}"))) == "TOKEN_INVALID"


def test_only_three_strict_segments_with_a_valid_signature_are_a_token(mint: Mint) -> None:
    verifier, token = verifier_of(mint), mint.token()
    header, payload, signature = token.split(".")
    last = signature[:-1] + chr(ord(signature[-1]) ^ 1)
    for text in (
        "", ".", "..", "...", f"{header}.{payload}", f"{header}.{payload}.", f".{payload}.{signature}", f"{token}.",
        f"{token}.{signature}", f"{header}=.{payload}.{signature}", f"{token}==", f"{token}\n", f" {token}",
        f"{token} ",
        f"{header}.{payload}.{signature[:-1]}", f"{header}.{payload}.{signature[:-4]}", f"{token}AAAA",
        f"{header}.{payload}.{'A' * len(signature)}", f"{header}.{payload}.{last}", 
        f"{header}.{payload}.+{signature[1:]}",
        f"{header}.{b64(json.dumps(mint.claims(roles=['admin'])).encode())}.{signature}", f"{token}é", f"{token}\udc80",
        f"{b64(json.dumps({**mint.header(), 'alg': 'none'}).encode())}.{payload}.", Mint().token(),
    ):  # fmt: skip
        assert reason_of(lambda: verifier.verify(text)) == "TOKEN_INVALID", text  # noqa: B023
    assert reason_of(lambda: verifier.verify(mint.token(username="a" * 9000))) == "TOKEN_INVALID"
    assert verifier.verify(token)


def test_expiry_and_issue_time_have_five_seconds_of_leeway() -> None:
    clock = Clock()
    mint = Mint(clock=clock)
    verifier, token, start = verifier_of(mint, clock=clock), mint.token(), clock.now
    for seconds, reason in ((0, None), (904.9, None), (905, "TOKEN_EXPIRED"), (-5, None), (-6, "TOKEN_INVALID")):
        clock.now = start + seconds
        # Twice: what is remembered is judged by the same clock.
        for _ in range(2):
            if reason is None:
                assert verifier.verify(token)
            else:
                assert reason_of(lambda: verifier.verify(token)) == reason, seconds
    clock.now = start
    for exp in (0, -1, -(2**63)):
        assert reason_of(lambda: verifier.verify(mint.token(exp=exp))) == "TOKEN_EXPIRED"  # noqa: B023
    assert reason_of(lambda: verifier.verify(mint.token(exp=1, aud="other"))) == "TOKEN_INVALID"
    assert verifier.verify(mint.token(exp=2**62)).expire_time.year == 9998


def test_a_thousand_first_checks_fetch_the_keys_once(mint: Mint) -> None:
    fetches, token = Counter(), mint.token()

    def fetch() -> dict[str, Any]:
        fetches.add()
        time.sleep(0.2)
        return mint.jwks()

    verifier = Verifier(ISSUER, AUDIENCE, keys=KeySet(fetch))

    async def many() -> list[Caller]:
        return await asyncio.gather(*(verifier.verify_async(token) for _ in range(900)))

    with ThreadPoolExecutor(101) as threads:
        coroutines = threads.submit(asyncio.run, many())
        checks = [threads.submit(verifier.verify, token) for _ in range(100)]
        assert len({check.result() for check in checks} | set(coroutines.result())) == 1
    assert fetches.value == 1


def test_a_cancelled_check_does_not_cancel_the_fetch_of_others(mint: Mint) -> None:
    release, token = threading.Event(), mint.token()

    def fetch() -> dict[str, Any]:
        release.wait()
        return mint.jwks()

    verifier = Verifier(ISSUER, AUDIENCE, keys=KeySet(fetch))

    async def two() -> Caller:
        first, second = (asyncio.create_task(verifier.verify_async(token)) for _ in range(2))
        await asyncio.sleep(0.05)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        release.set()
        return await second

    assert asyncio.run(two()).username == "ada"


def test_the_cache_is_bounded_and_forgets_what_was_not_used(mint: Mint, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier, checked = verifier_of(mint, cache_size=3), list[str]()
    tokens = {name: mint.token(username=name) for name in "abcd"}

    def verify(token: str, *rest: Any) -> Any:
        verified = check(token, *rest)
        checked.append(verified.caller.username)
        return verified

    check = _jwt.verify
    monkeypatch.setattr(_jwt, "verify", verify)
    for name in "abcadabcd":
        assert verifier.verify(tokens[name]).username == name
    assert checked == ["a", "b", "c", "d", "b", "c", "d"], "signatures are checked of tokens that were forgotten"


def test_revocations_are_looked_at_for_a_remembered_token(mint: Mint) -> None:
    state = RevocationState(when_unknown="accept")
    verifier, token = verifier_of(mint, revocations=state), mint.token()
    caller = verifier.verify(token)
    ended = SessionEnded(session_id=caller.session_id)
    state.apply(WatchRevocationsResponse(session_ended=ended, forget_time=timestamp(time.time() + 900)))
    assert reason_of(lambda: verifier.verify(token)) == "SESSION_REVOKED"


def test_the_keys_of_the_real_server_rotate(stage: Stage) -> None:
    keys = KeySet.at(f"{stage.issuer}/.well-known/jwks.json", cooldown=1)
    verifier = Verifier(stage.issuer, stage.audience, keys=keys)
    before = stage.account()
    assert verifier.verify(before["accessToken"]).subject == before["id"]
    stage.post("/keys/rotate")
    after = stage.account()
    assert verifier.verify(after["accessToken"]).subject == after["id"]
    assert verifier.verify(before["accessToken"]).subject == before["id"], "the old key is still published"
    fresh = Verifier(stage.issuer, stage.audience)
    assert fresh.verify(before["accessToken"]).email == before["email"]


def test_a_service_of_the_real_server_is_one(stage: Stage) -> None:
    with open_channel(stage.grpc_addr, None) as channel:
        source = TokenSource.from_service_account(channel, stage.client_id, stage.client_secret)
        caller = Verifier(stage.issuer, stage.audience).verify(source.token())
    assert (caller.subject, caller.client_id, caller.subject_type) == (stage.client_id, stage.client_id, "service")
    assert reason_of(lambda: Verifier(stage.issuer, "other").verify(source.token())) == "TOKEN_INVALID"


def test_nobody_is_refused_as_invalid_while_there_are_no_keys(mint: Mint) -> None:
    def fails() -> dict[str, Any]:
        raise OSError("no network")

    with pytest.raises(PosternError) as refused:
        Verifier(ISSUER, AUDIENCE, keys=KeySet(fails)).verify(mint.token())
    assert (refused.value.code.name, refused.value.retry_delay) == ("UNAVAILABLE", 1.0)
