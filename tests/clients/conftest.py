"""Fixtures of the black-box tests, which run real clients against the real binary on both engines.

The tests of a module share `server`, which hashes passwords cheaply. A test that needs its own settings, a crash or an
empty database uses `start_server` and `engine`.
"""

import os
from pathlib import Path

import pytest

from support import pb
from support.admin import TRANSPORTS, any_way
from support.browser import Browser, find_chromium
from support.engine import Postgres, Sqlite, make_template
from support.faketime import ClockedServer, find_library
from support.keys import published_keys
from support.mail import Mailbox
from support.postgres import Cluster, find_binaries
from support.server import Server

ENGINES = ("sqlite", "postgres")
PAIRED = ("engine", "server", "way", "by")
PAIRS_IN_EVERY_RUN = {("sqlite", "REST"), ("postgres", "gRPC")}
LEFT_OUT = pytest.StashKey[set]()


def pytest_addoption(parser):
    parser.addoption("--nightly", action="store_true", help="run every test, each in its full size")


def pytest_configure(config):
    config.stash[LEFT_OUT] = set()
    # The workers of pytest-xdist load the stubs that their controller generated.
    pb.load(Path(config.workerinput["stubs"]) if hasattr(config, "workerinput") else pb.generate())


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Called in the controller for each worker before it starts."""
    node.workerinput["stubs"] = str(pb.generate())


def pytest_collection_modifyitems(config, items):
    """Deselects the tests for nightly runs: those marked `nightly`, and half of the pairs of engine and transport."""
    if config.getoption("nightly"):
        return
    selected = one_transport_per_engine([item for item in items if not item.get_closest_marker("nightly")])
    chosen = set(selected)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = selected


def one_transport_per_engine(items: list) -> list:
    """Reduces tests that run on both engines over both transports to SQLite over REST and PostgreSQL over gRPC.

    The gateway does not depend on the engine, and the stores do not depend on the transport. So a fault in either shows
    in one of these two pairs.
    """
    pairs, groups = {}, {}
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        engine = parameters.get("engine", parameters.get("server"))
        transport = parameters.get("way", parameters.get("by"))
        if engine in ENGINES and transport in TRANSPORTS:
            rest = [(name, index) for name, index in item.callspec.indices.items() if name not in PAIRED]
            group = (item.nodeid.partition("[")[0], tuple(sorted(rest)))
            pairs[item] = group, (engine, transport)
            groups.setdefault(group, set()).add((engine, transport))
    complete = len(ENGINES) * len(TRANSPORTS)
    return [
        item
        for item in items
        if item not in pairs or len(groups[pairs[item][0]]) < complete or pairs[item][1] in PAIRS_IN_EVERY_RUN
    ]


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = sorted(session.config.stash[LEFT_OUT])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Called in the controller when a worker has ended."""
    node.config.stash[LEFT_OUT].update(getattr(node, "workeroutput", {}).get("left_out", ()))


def pytest_terminal_summary(terminalreporter, config):
    for what in sorted(config.stash[LEFT_OUT]):
        terminalreporter.write_line(f"LEFT OUT: {what}", red=True, bold=True)


@pytest.fixture(scope="session")
def left_out(pytestconfig):
    """Skips a test and reports that at the end of the run. With CI=true it fails the test instead."""

    def leave_out(what: str):
        if os.environ.get("CI") == "true":
            pytest.fail(what)
        pytestconfig.stash[LEFT_OUT].add(what)
        pytest.skip(what)

    return leave_out


@pytest.fixture(scope="session")
def size(pytestconfig):
    """Chooses the size of a test: the full number in nightly runs, the small number in all others."""

    def choose(small: int, full: int) -> int:
        return full if pytestconfig.getoption("nightly") else small

    return choose


@pytest.fixture(scope="session")
def binary() -> Path:
    """The binary under test: `POSTERN_BIN`, or the output of `cargo build`."""
    path = pb.REPOSITORY / os.environ.get("POSTERN_BIN", "target/debug/postern")
    if not path.exists():
        pytest.fail(f"{path.name} is not built: run `cargo build`, or point POSTERN_BIN at it")
    return path


@pytest.fixture(scope="session")
def postgres_binaries(left_out) -> Path:
    found = find_binaries()
    return found or left_out("everything on PostgreSQL: install it or point POSTERN_TEST_PG_BIN at its binaries")


@pytest.fixture(scope="session")
def cluster(postgres_binaries, binary):
    """The cluster that all tests of a worker share. Each test gets its own database in it, migrated already."""
    cluster = Cluster(postgres_binaries)
    try:
        cluster.start()
        make_template(cluster, binary)
        yield cluster
    finally:
        cluster.remove()


def _new_engine(name: str, request, directory: Path):
    return Sqlite(directory / "data") if name == "sqlite" else Postgres(request.getfixturevalue("cluster"))


@pytest.fixture(params=ENGINES)
def engine(request, tmp_path):
    """An empty database for one test, on each engine."""
    engine = _new_engine(request.param, request, tmp_path)
    yield engine
    engine.close()


@pytest.fixture
def embedded(tmp_path):
    """An empty SQLite database, for tests in which the engine makes no difference."""
    return Sqlite(tmp_path / "data")


@pytest.fixture
def start_server(binary, tmp_path):
    """Starts a server for one test. `settings` are `POSTERN_*` variables in lower case."""
    started = []

    def start(engine, **settings) -> Server:
        directory = tmp_path / f"server-{len(started)}"
        directory.mkdir()
        server = Server(binary, engine, directory, **settings)
        started.append(server)
        return server.start()

    yield start
    _close_all(started)


@pytest.fixture
def start_with_clock(binary, tmp_path, left_out):
    """Starts a server with a clock of its own for one test: an offset from the right time, such as `+10d`."""
    library = find_library() or left_out("everything with wrong clocks: install libfaketime")
    started = []

    def start(engine, clock: str, **settings) -> ClockedServer:
        directory = tmp_path / f"clocked-{len(started)}"
        directory.mkdir()
        server = ClockedServer(binary, engine, directory, library, clock, **settings)
        started.append(server)
        return server.start()

    yield start
    _close_all(started)


@pytest.fixture(scope="session")
def browser(left_out, tmp_path_factory):
    """The browser that the tests of one process share: each page has a profile of its own in it."""
    chromium = find_chromium() or left_out("everything in a browser: run `scripts/tools chromium`")
    browser = Browser(chromium, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def start_mailbox():
    """Starts an SMTP server for one test, which may make it fail."""
    started = []

    def start(**options) -> Mailbox:
        started.append(Mailbox(**options))
        return started[-1].start()

    yield start
    for mailbox in started:
        mailbox.close()


@pytest.fixture(scope="module")
def mailbox():
    """The SMTP server that a module's tests share."""
    mailbox = Mailbox()
    try:
        yield mailbox.start()
    finally:
        mailbox.close()


@pytest.fixture(scope="module")
def settings() -> dict[str, str]:
    """The settings of the shared server. A module that needs other settings overrides this fixture."""
    return {}


@pytest.fixture(scope="module", params=ENGINES)
def server(request, binary, tmp_path_factory, settings):
    """The server that a module's tests share, on each engine. Its database starts empty."""
    directory = tmp_path_factory.mktemp("server")
    yield from _serve(_new_engine(request.param, request, directory), binary, directory, settings)


@pytest.fixture(scope="module")
def embedded_server(binary, tmp_path_factory, settings):
    """The same on SQLite alone, for modules in which the engine makes no difference."""
    directory = tmp_path_factory.mktemp("server")
    yield from _serve(Sqlite(directory / "data"), binary, directory, settings)


def _serve(engine, binary: Path, directory: Path, settings: dict):
    server = Server(binary, engine, directory, **settings)
    try:
        yield server.start()
    finally:
        _close_all([server])
        engine.close()


@pytest.fixture
def client(server):
    """A connection to the shared server."""
    return server.client


@pytest.fixture(params=TRANSPORTS)
def way(request, server):
    """Calls to every service of the shared server, by gRPC and by REST."""
    with any_way(request.param, server) as way:
        yield way


@pytest.fixture
def jwks(server) -> list[dict]:
    """The published keys of the shared server, from the command line."""
    return published_keys(server)


@pytest.fixture
def session(client):
    """The tokens of a new user. They must still work at the end of the test."""
    _, tokens = client.newcomer()
    yield tokens
    assert client.me(tokens.access_token)
    assert client.refresh(tokens.refresh_token)


def _close_all(servers) -> None:
    """Closes every server, even if the checks of one fail. Then raises the first failure."""
    complaints = []
    for server in reversed(servers):
        try:
            server.close()
        except AssertionError as complaint:
            complaints.append(complaint)
    if complaints:
        raise complaints[0]
