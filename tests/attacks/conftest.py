"""Fixtures of the attacks. They use the servers and the support modules of `tests/clients`."""

import functools
import importlib.util
import sys
from pathlib import Path

import pytest

CLIENTS = Path(__file__).resolve().parent.parent / "clients"
sys.path.insert(0, str(CLIENTS))

_spec = importlib.util.spec_from_file_location("clients_conftest", CLIENTS / "conftest.py")
_clients = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_clients)

binary, embedded, start_any_server = _clients.binary, _clients.embedded, _clients.start_server


@pytest.fixture
def start_server(start_any_server):
    """Starts a server without an access log: this process reads the log, and would measure how long it reads it."""
    return functools.partial(start_any_server, access_log="false")

def pytest_addoption(parser):
    parser.addoption("--nightly", action="store_true", help="run every test")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("nightly"):
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]


def pytest_configure():
    _clients.pb.load(_clients.pb.generate())
