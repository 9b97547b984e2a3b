"""The vectors: tokens that the real server made, and its verdict about each."""

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from postern.auth.v1.token_service_pb2 import Heartbeat, WatchRevocationsResponse
from support import timestamp

from postern_client import Caller, Demand, KeySet, PosternError, RevocationState, Verifier
from postern_client._waiting import run
from postern_client.demands import authorize


def test_every_verdict_is_that_of_the_server() -> None:
    vectors = json.loads(Path(os.environ["POSTERN_VECTORS"]).read_text())
    found = {case["name"]: judge(vectors, case) for case in vectors["cases"]}
    expected = {case["name"]: (case["verdict"], case.get("caller")) for case in vectors["cases"]}
    assert len(expected) == len(vectors["cases"]) > 50
    differing = {name: (found[name], expected[name]) for name in expected if found[name] != expected[name]}
    assert differing == {}


def test_tokens_of_every_algorithm_are_accepted() -> None:
    algorithms = json.loads(Path(os.environ["POSTERN_VECTORS"]).read_text())["algorithms"]
    assert len(algorithms) == 2
    for one in algorithms:
        keys = KeySet(partial(dict, one["jwks"]))
        verifier = Verifier(one["issuer"], one["audience"], keys=keys)
        assert verifier.verify(one["token"]).subject == one["subject"], one["algorithm"]


def judge(vectors: dict[str, Any], case: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    state = RevocationState(when_unknown="refuse")
    for message in case["revocations"]:
        state.apply(json_format.ParseDict(message, WatchRevocationsResponse()))
    state.apply(WatchRevocationsResponse(heartbeat=Heartbeat(complete_time=timestamp(time.time()))))
    keys = KeySet(lambda: vectors["jwks"])
    verifier = Verifier(vectors["issuer"], vectors["audience"], keys=keys, revocations=state)
    demand = Demand(case["demand"]["subject_type"] or "authenticated", case["demand"]["role"])
    try:
        caller = run(authorize(verifier, demand, [f"Bearer {case['token']}"]))
    except PosternError as refusal:
        return refusal.reason, None
    assert caller is not None
    return "ACCEPTED", as_json(caller)


def as_json(caller: Caller) -> dict[str, Any]:
    written = {
        "subject": caller.subject,
        "subjectType": caller.subject_type,
        "clientId": caller.client_id,
        "sessionId": caller.session_id,
        "tokenId": caller.token_id,
        "username": caller.username,
        "email": caller.email,
        "emailVerified": caller.email_verified,
        "roles": list(caller.roles),
    }
    return {name: value for name, value in written.items() if value is not None}
