"""The lists of accounts and of audit events, page by page, by gRPC and by REST.

It tests which entries are found and in which order, that each page continues where the previous one ended even if
accounts are created and deleted in between, that later pages cost no more than earlier ones, and for which query a page
token is valid. The events themselves are tested in `test_audit`.
"""

import base64
import random
import re
import threading
import time

import pytest

from support import load
from support.admin import Somebody, any_way, everything, pages
from support.client import Person
from support.wait import wait_until

LISTS = {"ListUsers": "users", "ListAuditEvents": "events"}
STABLE = 3_000
MANY = 100_000


@pytest.fixture
def admin(way, server) -> Somebody:
    return Somebody(way, server.engine, "admin")


def found(way, admin: Somebody, query: str, **fields) -> list[str]:
    """The usernames that a search finds, over all pages."""
    users = everything(way, "ListUsers", admin.credential, "users", query=query, **fields)
    return [user["username"] for user in users]


def signed_up(way, **names: str) -> str:
    return way.sign_up(Person(**names))["username"]


def unique() -> str:
    return f"q{random.randrange(36**8):x}"


# -- what is found -------------------------------------------------------------------------------------------------


def test_accounts_are_listed_oldest_first_and_as_they_are(way, admin):
    made = [way.sign_up(Person()) for _ in range(3)]
    listed = everything(way, "ListUsers", admin.credential, "users", page_size=200)
    ids = [user["id"] for user in listed]
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)
    assert [user for user in listed if user["id"] in {account["id"] for account in made}] == made


def test_a_search_finds_what_begins_so_and_nothing_else(way, admin):
    name = unique()
    by_name = signed_up(way, username=f"{name}-a")
    by_email = signed_up(way, email=f"{name}.b@example.com")
    by_both = signed_up(way, username=f"{name}-c", email=f"{name}.c@example.com")
    signed_up(way, username=f"x{name}", email=f"x{name}@example.com")

    assert sorted(found(way, admin, name)) == sorted([by_name, by_email, by_both]), "each once"
    assert found(way, admin, f"{name}-a") == [by_name]
    assert found(way, admin, f"{name}.b@example.com") == [by_email], "the whole address too"
    assert found(way, admin, f"{name}.b@example.com.") == []


def test_a_search_takes_any_case(way, admin):
    name = unique()
    made = {signed_up(way, username=f"{name.upper()}-A"), signed_up(way, email=f"{name}.B@Example.com")}
    for query in (name, name.upper(), name.title(), f"  {name} "):
        assert set(found(way, admin, query)) == made


def test_what_sql_takes_for_a_pattern_is_text_in_a_search(way, admin):
    name = unique()
    percent = signed_up(way, email=f"{name}%a@example.com")
    underscore = signed_up(way, username=f"{name}_a")
    signed_up(way, username=f"{name}xa", email=f"{name}xa@example.com")

    assert found(way, admin, f"{name}%") == [percent]
    assert found(way, admin, f"{name}_") == [underscore]
    for nothing in ("%", "_", "%@example.com", f"{name}*", f"{name}?", f"{name}\\", f"{name}'", f"{name}' OR '1'='1"):
        assert found(way, admin, nothing) == [], nothing


def test_a_search_for_what_no_name_holds_finds_nothing(way, admin):
    for query in ("\U0010ffff", "ﬁ", "é" * 100, "a" * 254, "\u202e"):
        assert found(way, admin, query) == [], query


def test_a_search_that_is_too_long_or_unprintable_is_an_invalid_field(way, admin):
    for query in ("a" * 255, "é" * 128, "a\0", "a\nb", "\x7f"):
        way.refused(
            "ListUsers", "INVALID_ARGUMENT", "INVALID_FIELD", {"query"}, credential=admin.credential, query=query
        )


@pytest.mark.parametrize("page_size", [1, 2, 3, 5])
def test_the_pages_of_a_search_hold_each_account_once(way, admin, page_size):
    name = unique()
    made = [signed_up(way, email=f"{name}.{letter}@example.com") for letter in "abc"]
    made += [signed_up(way, username=f"{name}-{letter}") for letter in "def"]
    made += [signed_up(way, username=f"{name}-g", email=f"{name}.g@example.com")]
    assert sorted(found(way, admin, name, page_size=page_size)) == sorted(made)


# -- pages ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def crowded(server):
    """More accounts than a page holds, and a name to search them by."""
    load.insert(server.engine, 1, 450)
    yield "crowd-"
    load.delete(server.engine, 1, 450)


@pytest.mark.parametrize(("asked", "size"), [(None, 50), (0, 50), (1, 1), (200, 200), (201, 200), (2**31 - 1, 200)])
@pytest.mark.parametrize("query", ["", "crowd-"])
def test_a_page_has_50_entries_where_nothing_is_said_and_never_more_than_200(way, admin, crowded, asked, size, query):
    fields = {} if asked is None else {"page_size": asked}
    page = way.ok("ListUsers", credential=admin.credential, query=query, **fields)
    assert len(page["users"]) == size
    assert page["nextPageToken"]


def test_the_last_page_says_so_also_if_it_is_full(way, admin, crowded):
    call = {"credential": admin.credential, "query": "crowd-4", "page_size": 1}
    # crowd-4, crowd-40 to 49, crowd-400 to 450.
    assert len(everything(way, "ListUsers", of="users", **call)) == 62
    page = way.ok("ListUsers", credential=admin.credential, query="crowd-44", page_size=11)
    assert len(page["users"]) == 11
    assert page["nextPageToken"] == ""


@pytest.mark.parametrize("rpc", LISTS)
def test_a_negative_page_size_is_an_invalid_field(way, admin, rpc):
    for size in (-1, -(2**31)):
        call = {"credential": admin.credential, "page_size": size}
        way.refused(rpc, "INVALID_ARGUMENT", "INVALID_FIELD", {"page_size"}, **call)


def bent(token: str) -> list[str]:
    """Tokens that differ slightly from this one."""
    middle = len(token) // 2
    other = "A" if token[middle] != "A" else "B"
    raw = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
    return [
        f"{token[:middle]}{other}{token[middle + 1 :]}",
        token[:-1],
        token[1:],
        f"{token}A",
        f"{token}=",
        f" {token}",
        token.swapcase(),
        token + token,
        base64.urlsafe_b64encode(raw[:12]).decode().rstrip("="),
        base64.urlsafe_b64encode(bytes(len(raw))).decode().rstrip("="),
    ]


@pytest.mark.parametrize("rpc", LISTS)
def test_a_page_token_that_was_not_given_out_is_an_invalid_field(way, admin, crowded, rpc):
    token = way.ok(rpc, credential=admin.credential, page_size=1)["nextPageToken"]
    for bad in ("nonsense", "1", "AAAA", "é", admin.credential, admin.id, "A" * 5_000, *bent(token)):
        call = {"credential": admin.credential, "page_size": 1}
        way.refused(rpc, "INVALID_ARGUMENT", "INVALID_FIELD", {"page_token"}, page_token=bad, **call)


def test_a_page_token_is_good_for_its_own_query_alone(way, admin, crowded):
    call = {"credential": admin.credential, "page_size": 1}
    first = {query: way.ok("ListUsers", query=query, **call)["nextPageToken"] for query in ("", "crowd-1", "crowd-2")}
    for query, token in first.items():
        assert way.ok("ListUsers", query=query, page_token=token, **call)["users"]
        for other in first.keys() - {query}:
            way.refused(
                "ListUsers", "INVALID_ARGUMENT", "INVALID_FIELD", {"page_token"}, query=other, page_token=token, **call
            )


def test_a_page_token_is_good_for_its_own_list_alone(way, admin, crowded):
    call = {"credential": admin.credential, "page_size": 1}
    tokens = {rpc: way.ok(rpc, **call)["nextPageToken"] for rpc in LISTS}
    filters = [{"user_id": admin.id}, {"action": "sign_up"}]
    refused = ("INVALID_ARGUMENT", "INVALID_FIELD", {"page_token"})
    way.refused("ListAuditEvents", *refused, page_token=tokens["ListUsers"], **call)
    way.refused("ListUsers", *refused, page_token=tokens["ListAuditEvents"], **call)
    for fields in filters:
        way.refused("ListAuditEvents", *refused, page_token=tokens["ListAuditEvents"], **fields, **call)


def test_a_page_token_outlives_a_restart_and_is_good_at_any_page_size(server, crowded):
    with any_way("gRPC", server) as way:
        admin = Somebody(way, server.engine, "admin")
        token = way.ok("ListUsers", credential=admin.credential, query="crowd-", page_size=1)["nextPageToken"]
    server.restart()
    with any_way("REST", server) as way:
        call = {"credential": admin.credential, "query": "crowd-", "page_token": token}
        assert len(way.ok("ListUsers", page_size=100, **call)["users"]) == 100


def test_a_page_token_tells_nobody_an_address(way, admin, crowded):
    token = way.ok("ListUsers", credential=admin.credential, query="crowd-", page_size=1)["nextPageToken"]
    raw = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
    assert b"crowd" not in raw


# -- many accounts, with concurrent changes ------------------------------------------------------------------------


class Traffic:
    """Inserts and deletes accounts among the permanent ones until the `with` block ends."""

    def __init__(self, engine, last: int):
        self._engine, self._last = engine, last
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.changes = 0

    def __enter__(self) -> "Traffic":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join(10)

    def wait_for_changes(self, count: int) -> None:
        wait_until(f"{count} accounts came or went", lambda: self.changes >= count, pause=0.002)

    def _run(self) -> None:
        dice, present = random.Random(20261123), set()
        while not self._over.is_set():
            # The permanent accounts have even numbers. These have odd ones, so they lie anywhere between them.
            number = 2 * dice.randrange(self._last // 2) + 1
            if number in present:
                load.delete(self._engine, number, number)
                present.discard(number)
            else:
                load.insert(self._engine, number, number, names="crowd-t")
                present.add(number)
                if dice.random() < 0.7:
                    self._over.wait(0.002)
                    load.delete(self._engine, number, number)
                    present.discard(number)
            self.changes += 1


@pytest.fixture
def stable(server) -> int:
    """Inserts the accounts with even numbers and returns the last number."""
    last = 2 * STABLE
    load.insert(server.engine, 2, last, step=2)
    yield last
    load.delete(server.engine, 1, last)


@pytest.mark.parametrize("query", ["", "crowd-"])
@pytest.mark.parametrize("way", ["gRPC"], indirect=True)
def test_all_accounts_are_listed_exactly_once_while_others_come_and_go(server, way, admin, stable, query):
    with Traffic(server.engine, stable) as traffic:
        names = []
        for number, page in enumerate(pages(way, "ListUsers", admin.credential, query=query, page_size=97)):
            names += [user["username"] for user in page.get("users", [])]
            # Waits for changes between the first pages. A fast machine could otherwise read all pages before any.
            if number < 5:
                traffic.wait_for_changes(number + 1)
    staying = [name for name in names if re.fullmatch(r"crowd-\d+", name)]
    assert sorted(staying) == sorted(f"crowd-{number}" for number in range(2, stable + 1, 2))
    assert len(set(names)) == len(names), "no other account is listed twice"
    assert traffic.changes >= 5


@pytest.mark.timeout(240)
def test_many_accounts_are_paged_through_by_an_index(engine, start_server, cluster, capsys, size):
    server = start_server(engine)
    many = size(MANY // 10, MANY)
    load.insert(engine, 1, many)
    load.settle_statistics(engine)
    plans = None
    if engine.name == "postgres":
        plans = load.Plans(engine, cluster._directory / "log")
        plans.watch()
        server.restart()
    with any_way("gRPC", server) as way:
        admin = Somebody(way, engine, "admin")
        started = time.monotonic()
        names = found(way, admin, "", page_size=200)
        seconds = time.monotonic() - started
        # This search reads many pages in each of its two orders, by address and by username.
        searched = found(way, admin, "crowd-99", page_size=200)
    with capsys.disabled():
        print(f"\n{engine.name}: {many} accounts in {seconds:.1f} s, {1000 * seconds / (many / 200):.1f} ms a page")
    assert len(names) == len(set(names)) == many + 1
    # Numbers that begin with 99: one of two digits, ten of three, and so on.
    assert len(searched) == len(set(searched)) == (many - 1) // 90
    if plans is None:
        expect_index_ranges_on_sqlite(engine)
    else:
        expect_index_ranges(plans.of(re.compile(r"FROM users u (WHERE .* )?ORDER BY .* LIMIT")), many)


def expect_index_ranges_on_sqlite(engine) -> None:
    for name, statement in load.SQLITE_SHAPES.items():
        plan = load.sqlite_plan(engine, statement)
        assert "TEMP B-TREE" not in plan, f"{name} is sorted: {plan}"
        # The table is its own primary key (WITHOUT ROWID). A scan without a bound is in order and stops at the limit.
        assert "SEARCH u USING" in plan or name == "all, first page", f"{name} reads no range of an index: {plan}"


def expect_index_ranges(plans: list[dict], many: int) -> None:
    assert len(plans) >= many // 200, "the plan of every page was logged"
    orders = set()
    for plan in plans:
        found = load.nodes(plan)
        kinds = {node["Node Type"] for node in found}
        assert not kinds & {"Seq Scan", "Sort", "Incremental Sort", "Bitmap Heap Scan"}, plan
        [scan] = [node for node in found if node.get("Relation Name") == "users"]
        orders.add(scan["Index Name"])
        read = scan["Actual Rows"] + scan.get("Rows Removed by Filter", 0)
        # A search by username reads and skips the accounts that were already found by address.
        assert read <= 201 or scan["Index Name"] == "users_username", plan
    assert orders == {"users_pkey", "users_email_prefix", "users_username"}
