from collections.abc import Iterator

import grpc
import pytest
from support import FakePostern, Mint, Stage, serving


@pytest.fixture
def mint() -> Mint:
    return Mint()


@pytest.fixture
def fake() -> FakePostern:
    return FakePostern()  # type: ignore[abstract]


@pytest.fixture
def channel(fake: FakePostern) -> Iterator[grpc.Channel]:
    with serving(fake) as channel:
        yield channel


@pytest.fixture(scope="session")
def stage() -> Stage:
    return Stage()
