"""Fixtures of the tests that run the client libraries. Each process has one server, and its tests ask for accounts."""

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from staging import ROOT, Stage  # noqa: E402
from support import pb  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--nightly", action="store_true", help="as in tests/clients; no test here has another size")
    parser.addoption("--language", action="append", help="only this one; may be given more than once")


def pytest_collection_modifyitems(config, items):
    wanted = config.getoption("language")
    if wanted:
        items[:] = [item for item in items if getattr(item.cls, "language", None) in (None, *wanted)]


@pytest.fixture(scope="session")
def binary() -> Path:
    """The binary under test: `POSTERN_BIN`, or the output of `cargo build`."""
    return ROOT / os.environ.get("POSTERN_BIN", "target/debug/postern")


@pytest.fixture(scope="session")
def stage(binary, tmp_path_factory):
    """A Postern, the accounts of its admin and of a service, and a proxy before it that can be cut."""
    pb.load(pb.generate())
    stage = Stage(binary, tmp_path_factory.mktemp("stage"))
    yield stage
    stage.close()


@pytest.fixture(scope="session")
def vectors(stage) -> dict:
    from vectors import make

    return make(stage)


@pytest.fixture(scope="session")
def variables(stage, vectors, tmp_path_factory) -> dict[str, str]:
    """What the tests of the libraries read."""
    file = tmp_path_factory.mktemp("vectors") / "vectors.json"
    file.write_text(json.dumps(vectors, indent=1))
    return {**stage.variables(), "POSTERN_VECTORS": str(file)}
