import time

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from postern.auth.v1.token_service_pb2 import (
    Heartbeat,
    RolesChanged,
    SessionEnded,
    WatchRevocationsResponse,
)
from support import Clock, a_caller, reason_of, timestamp

from postern_client import RevocationState


def ended(id: str, forget_time: float) -> WatchRevocationsResponse:
    return WatchRevocationsResponse(session_ended=SessionEnded(session_id=id), forget_time=timestamp(forget_time))


def roles(*roles: str, forget_time: float, disabled: bool = False) -> WatchRevocationsResponse:
    changed = RolesChanged(user_id="u1", roles=roles, disabled=disabled)
    return WatchRevocationsResponse(roles_changed=changed, forget_time=timestamp(forget_time))


def heartbeat(complete_time: float) -> WatchRevocationsResponse:
    return WatchRevocationsResponse(heartbeat=Heartbeat(complete_time=timestamp(complete_time)))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def state(clock: Clock) -> RevocationState:
    return RevocationState(when_unknown="accept", clock=clock)


def test_tokens_with_this_sid_or_jti_are_refused_until_the_forget_time(state: RevocationState, clock: Clock) -> None:
    state.apply(ended("s1", clock.now + 60))
    state.apply(ended("t2", clock.now + 60))
    for caller in (a_caller(), a_caller(session_id="s2", token_id="t2")):
        assert reason_of(lambda: state.check(caller)) == "SESSION_REVOKED"  # noqa: B023
    assert state.check(a_caller(session_id="s2"))
    assert len(state) == 2
    clock.now += 64.9
    assert reason_of(lambda: state.check(a_caller())) == "SESSION_REVOKED"
    clock.now += 0.1
    assert state.check(a_caller())
    state.apply(heartbeat(clock.now))
    assert len(state) == 0


def test_the_last_message_about_an_account_counts(state: RevocationState, clock: Clock) -> None:
    until = clock.now + 60
    state.apply(roles("user", "admin", forget_time=until))
    assert state.check(a_caller()).roles == ("user", "admin")
    assert state.check(a_caller(subject="u2")).roles == ("user",)
    state.apply(roles("user", forget_time=until, disabled=True))
    assert reason_of(lambda: state.check(a_caller())) == "SESSION_REVOKED"
    state.apply(roles(forget_time=until + 10))
    assert state.check(a_caller()).roles == ()
    state.apply(roles(forget_time=until + 10))
    clock.now += 74.9
    assert state.check(a_caller()).roles == ()
    clock.now += 0.1
    assert state.check(a_caller()).roles == ("user",)
    state.apply(heartbeat(clock.now))
    assert len(state) == 0


def test_an_account_is_not_forgotten_earlier_because_of_a_later_message(state: RevocationState, clock: Clock) -> None:
    state.apply(roles("admin", forget_time=clock.now + 60))
    state.apply(roles("user", forget_time=clock.now + 10, disabled=True))
    clock.now += 30
    state.apply(heartbeat(clock.now))
    assert reason_of(lambda: state.check(a_caller())) == "SESSION_REVOKED"


def test_a_message_that_comes_again_changes_nothing_and_costs_nothing(state: RevocationState, clock: Clock) -> None:
    for _ in range(100):
        state.apply(ended("s1", clock.now + 60))
        state.apply(roles("admin", forget_time=clock.now + 60))
    assert len(state) == len(state._forgetting) == 2


def test_what_this_version_does_not_know_is_skipped(state: RevocationState) -> None:
    state.apply(WatchRevocationsResponse(cursor="c"))
    assert len(state) == 0


@pytest.mark.parametrize("when_unknown", ["refuse", "accept"])
def test_what_happens_while_it_is_not_complete_is_the_users_choice(when_unknown: str, clock: Clock) -> None:
    state = RevocationState(when_unknown=when_unknown, max_staleness=30, clock=clock)  # type: ignore[arg-type]

    def verdict() -> str:
        if when_unknown == "accept":
            return "" if state.check(a_caller()) else "never"
        return reason_of(lambda: state.check(a_caller()))

    assert not state.is_complete()
    assert state.complete_time is None
    unknown = "STORE_UNAVAILABLE" if when_unknown == "refuse" else ""
    assert verdict() == unknown
    state.apply(heartbeat(clock.now))
    assert state.check(a_caller())
    assert state.complete_time is not None
    clock.now += 30
    assert state.check(a_caller())
    clock.now += 0.1
    assert not state.is_complete()
    assert verdict() == unknown
    state.apply(heartbeat(clock.now - 31))
    assert not state.is_complete(), "Postern cannot read its database"
    state.apply(heartbeat(clock.now - 29))
    assert state.is_complete()


def test_a_clock_that_is_set_back_does_not_make_it_complete(clock: Clock) -> None:
    state = RevocationState(when_unknown="refuse", max_staleness=0.2, clock=clock)
    state.apply(heartbeat(clock.now))
    clock.now -= 3600
    assert state.is_complete()
    time.sleep(0.3)
    assert not state.is_complete()


def test_what_is_known_to_be_revoked_is_refused_also_when_the_rest_is_not_known(
    state: RevocationState, clock: Clock
) -> None:
    state.apply(ended("s1", clock.now + 60))
    assert not state.is_complete()
    assert reason_of(lambda: state.check(a_caller())) == "SESSION_REVOKED"


def test_the_choice_has_no_default() -> None:
    with pytest.raises(TypeError):
        RevocationState()  # type: ignore[call-arg]
    for wrong in ("", "REFUSE", "yes", None):
        with pytest.raises(ValueError, match="when_unknown"):
            RevocationState(when_unknown=wrong)  # type: ignore[arg-type]


def test_the_state_is_bounded_and_not_complete_while_something_was_left_out(clock: Clock) -> None:
    state = RevocationState(when_unknown="refuse", most_entries=2, clock=clock)
    for number, seconds in enumerate((60, 100, 80)):
        state.apply(ended(f"s{number}", clock.now + seconds))
    state.apply(heartbeat(clock.now))
    assert len(state) == 2
    assert reason_of(lambda: state.check(a_caller(session_id="another"))) == "STORE_UNAVAILABLE"
    assert reason_of(lambda: state.check(a_caller(session_id="s1"))) == "SESSION_REVOKED"
    clock.now += 85
    state.apply(heartbeat(clock.now))
    assert state.check(a_caller(session_id="s2"))
    state.apply(ended("s3", clock.now + 60))
    assert len(state) == 2
    assert state.is_complete()


def test_a_message_without_times_is_forgotten_at_once(state: RevocationState) -> None:
    state.apply(WatchRevocationsResponse(session_ended=SessionEnded(session_id="s1"), forget_time=Timestamp()))
    assert state.check(a_caller())
