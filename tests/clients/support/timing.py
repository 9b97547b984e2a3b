"""Whether the time of an answer tells two kinds of calls apart."""

from collections.abc import Callable

ROUNDS = 5


def auc(some: list[float], others: list[float]) -> float:
    """How likely a call of the first kind takes longer than one of the second: 0.5 tells nothing."""
    longer = sum((one > other) + (one == other) / 2 for one in some for other in others)
    return longer / (len(some) * len(others))


def expect_alike(measure: Callable[[], tuple[list[float], list[float]]], tolerance: float) -> None:
    """Fails if the times of both kinds differ in each of several rounds.

    What else the machine does falls on one kind more than on the other in a round by chance, but not in every round.
    """
    rounds: list[float] = []
    while all(abs(told - 0.5) > tolerance for told in rounds):
        assert len(rounds) < ROUNDS, f"the time tells the two kinds apart, with an AUC of {rounds}"
        rounds.append(auc(*measure()))
    print("AUC of each round:", rounds)
