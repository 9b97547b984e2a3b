"""Fixtures of the container checks, which `scripts/image` runs. They use the support modules of `tests/clients`.

`POSTERN_IMAGE` names the image under test. `POSTERN_IMAGE_WHOLE=no` says that it was made around a binary that was
there, which has no list of its dependencies and may be a debug build. `POSTERN_IMAGE_OUT` is a directory for what is
produced.
"""

import os
import sys
import uuid
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "clients"))

from containers import Container, docker  # noqa: E402
from support import pb  # noqa: E402


def pytest_configure():
    pb.load(pb.generate())


@pytest.fixture(scope="session")
def image() -> str:
    return os.environ["POSTERN_IMAGE"]


@pytest.fixture(scope="session")
def whole() -> bool:
    """Whether the image was built from the sources by its Dockerfile."""
    return os.environ.get("POSTERN_IMAGE_WHOLE") != "no"


@pytest.fixture(scope="session")
def out() -> Path:
    return Path(os.environ["POSTERN_IMAGE_OUT"])


@pytest.fixture(scope="session")
def network():
    """A network of the tests; a private engine has none of its own."""
    name = f"postern-check-{uuid.uuid4().hex[:8]}"
    docker("network", "create", name)
    yield name
    docker("network", "rm", name)


@pytest.fixture
def run(image, network):
    """Runs the image as production would, read-only and without rights, with `settings` as `POSTERN_*` variables."""
    started = []

    def start(*command: str, options=(), **settings) -> Container:
        container = Container(image, network, command, options, settings)
        started.append(container)
        return container

    yield start
    for container in started:
        container.remove()
