"""The vectors hold what they are meant to hold: a judge that said the same of everything would prove nothing."""

from collections import Counter


def test_every_forgery_is_refused_and_every_reason_is_there(vectors):
    verdicts = Counter(case["verdict"] for case in vectors["cases"])
    reasons = {
        "TOKEN_INVALID",
        "TOKEN_EXPIRED",
        "SESSION_REVOKED",
        "USER_REQUIRED",
        "SERVICE_REQUIRED",
        "ROLE_REQUIRED",
    }
    assert set(verdicts) == {"ACCEPTED", *reasons}
    assert min(verdicts.values()) >= 2, verdicts
    forged = [case for case in vectors["cases"] if case["name"].startswith("forged: ")]
    assert len(forged) > 100
    assert {case["verdict"] for case in forged} == {"TOKEN_INVALID"}


def test_every_token_that_was_signed_otherwise_than_postern_signs_is_refused_but_for_these(vectors):
    signed = [case for case in vectors["cases"] if case["name"].startswith("signed")]
    assert len(signed) > 60
    assert {case["name"] for case in signed if case["verdict"] == "ACCEPTED"} == {
        "signed: signed by the key of the server, as it does",
        # No rule of the server looks at these: a person may come to have other clients, and claims are added.
        "signed: the client of a service",
        "signed: a claim that nobody knows",
    }


def test_two_keys_are_published_and_both_are_used(vectors):
    assert len(vectors["jwks"]["keys"]) == 2
