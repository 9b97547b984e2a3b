"""The operations address: probes that follow the server's state, and the metrics.

It tests `/livez`, `/readyz`, `/metrics` and the committed description of the REST API. That calls work again after an
outage is in `test_outage`.
"""

import json
import random
import re
import secrets
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import yaml

from support import contract, jose, metrics, pb
from support.client import Person
from support.engine import Postgres
from support.expect import failure_of
from support.http import Rest
from support.outbox import settle
from support.postgres import Cluster
from support.wait import wait_until

SQLITE_ALONE = pytest.mark.parametrize("server", ["sqlite"], indirect=True)
PAGE = pb.REPOSITORY / "docs/operations.md"
ME = f"{pb.PACKAGE}.AuthService/GetMe"
# Measured by its name too.
CHECK = "envoy.service.auth.v3.Authorization/Check"
ALERTS = pb.REPOSITORY / "deploy/prometheus/alerts.yml"
DASHBOARD = pb.REPOSITORY / "deploy/grafana/postern.json"
# The documented time is one second. A busy machine gets a few more.
FOLLOWS_WITHIN = 5


@pytest.fixture
def rest(server):
    return Rest(server)


@pytest.fixture
def operations(server):
    return Rest(server, "ops_addr")


@pytest.fixture(scope="session")
def promtool(left_out) -> str:
    own = pb.REPOSITORY / "target/tools/bin/promtool"
    found = str(own) if own.exists() else shutil.which("promtool")
    return found or left_out("checking /metrics with promtool: run `scripts/tools promtool`")


def scrape(operations: Rest) -> metrics.Exposition:
    answer = operations.get("/metrics")
    assert answer.status == 200
    assert answer.header("content-type").startswith("text/plain; version=0.0.4")
    return metrics.read(answer.body.decode())


def unready(operations: Rest) -> set[str] | None:
    """The parts that `/readyz` says are not ready; `None` if it answers 200."""
    answer = operations.get("/readyz")
    body = answer.json()
    assert answer.status == (200 if body["ready"] else 503)
    parts = {name for name, state in body["parts"].items() if state != "ready"}
    assert body["ready"] == (not parts)
    assert {"database", "accepting_calls"} == set(body["parts"])
    return parts or None


def live_through_everything(server) -> tuple[Person, dict]:
    """Causes every event that a metric counts, over REST and gRPC. Returns the user and the first tokens."""
    rest, client = Rest(server), server.client
    person, first = rest.newcomer()
    second = rest.post("/v1/auth/refresh", {"refreshToken": first["refreshToken"]}).ok()["tokens"]
    assert rest.post("/v1/auth/refresh", {"refreshToken": first["refreshToken"]}).ok(), "retried"
    third = client.refresh(second["refreshToken"])
    for token in (first["refreshToken"], third.refresh_token):
        assert rest.post("/v1/auth/refresh", {"refreshToken": token}).status == 401, "reused, then dead"
    client.me(client.login(person).access_token)
    client.logout(client.login(person).refresh_token)
    for call in (lambda: client.sign_up(person), lambda: client.login(Person()), lambda: client.me("nonsense")):
        failure_of(call)
    failure_of(lambda: client.send_bytes("/nowhere.Service/Nothing", b""))
    # First an address without an account, then more mail than an address gets, then more than a client may cause.
    for email in (Person().email, *[person.email] * 11, *[Person().email] * 50):
        client.request_password_reset(email)
    settle(server.engine)
    # More password attempts for one address than are allowed.
    stranger = Person()
    for _ in range(11):
        failure_of(lambda: client.login(stranger))
    return person, first


def test_a_serving_server_is_live_and_ready(operations):
    assert operations.get("/livez").status == 200
    assert unready(operations) is None


def test_readiness_names_the_database_while_it_is_away_and_heals_by_itself(postgres_binaries, start_server):
    cluster = Cluster(postgres_binaries)
    try:
        operations = Rest(start_server(Postgres(cluster.start())), "ops_addr")
        assert unready(operations) is None
        cluster.stop()
        wait_until("it is not ready", lambda: unready(operations) == {"database"})
        assert operations.get("/livez").status == 200, "a restart would not help"
        assert scrape(operations).value("postern_database_up") == 0
        cluster.start()
        wait_until("it is ready again", lambda: unready(operations) is None)
        wait_until("and counted as such", lambda: scrape(operations).value("postern_database_up") == 1)
    finally:
        cluster.remove()


def test_a_server_that_stops_says_so_before_it_stops_answering(embedded, start_server):
    server = start_server(embedded)
    operations, rest = Rest(server, "ops_addr"), Rest(server)
    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(server.stop)
        wait_until("it takes its leave", lambda: unready(operations) == {"accepting_calls"}, 5, pause=0.01)
        assert rest.get("/v1/me").status == 401, "calls are still answered"
        assert operations.get("/livez").status == 200
        stopped.result()


@SQLITE_ALONE
def test_the_operations_address_serves_nothing_else(operations):
    for path in ("/", "/v1/me", "/.well-known/jwks.json", "/openapi.json", "/metrics/", "//metrics", "/METRICS"):
        assert operations.get(path).status == 404, path
    for path in ("/livez", "/readyz", "/metrics"):
        answer = operations.post(path, {})
        assert answer.status == 405
        assert "GET" in answer.header("allow")
    call = {"content-type": "application/grpc", "te": "trailers"}
    assert operations.post(f"/{ME}", b"\0\0\0\0\0", headers=call).status == 404


def test_promtool_finds_nothing_to_complain_about(server, operations, promtool):
    live_through_everything(server)
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=scrape(operations).text, capture_output=True, text=True, timeout=30
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_every_metric_is_documented_and_every_documented_one_is_there(server, operations):
    live_through_everything(server)
    seen, rows = scrape(operations), metrics.documented(PAGE)
    assert rows, f"{PAGE.name} has no table of metrics"

    assert seen.types == {name: row.type for name, row in rows.items()}
    for name, row in rows.items():
        used = {(label, value) for metric, label, value in seen.label_values() if metric == name}
        assert {label for label, _ in used} == set(row.labels), name
        for label, listed in row.labels.items():
            values = {value for used_label, value in used if used_label == label}
            assert not listed or values == listed, f"{label} of {name}"


@pytest.fixture
def fresh(embedded, start_server):
    return start_server(embedded)


def test_every_counter_stands_at_zero_from_the_start(fresh):
    seen, rows = scrape(Rest(fresh, "ops_addr")), metrics.documented(PAGE)
    # What is done at the start, and what has no bound or no alert.
    started = {("postern_housekeeping_total", "done"), ("postern_signing_key_reads_total", "read")}
    for name, row in rows.items():
        if row.type != "counter" or name == "postern_rpcs_total":
            continue
        samples = {labels: value for (metric, labels), value in seen.samples.items() if metric == name}
        assert samples, name
        for labels, value in samples.items():
            assert value == 0 or any((name, label) in started for _, label in labels), f"{name} {set(labels)}"
        for label, listed in row.labels.items():
            there = {value for labels in samples for key, value in labels if key == label}
            assert there >= listed, f"{label} of {name}"
    kinds = {
        value for metric, label, value in seen.label_values() if (metric, label) == ("postern_mails_total", "kind")
    }
    assert {f"{kind}.{outcome}" for kind in kinds for outcome in rows["postern_mails_total"].labels["outcome"]} == {
        f"{dict(labels)['kind']}.{dict(labels)['outcome']}"
        for name, labels in seen.samples
        if name == "postern_mails_total"
    }
    for method in [*contract.rpcs(), CHECK, "other"]:
        labels = frozenset({("method", method), ("code", "INTERNAL")})
        assert seen.samples.get(("postern_rpcs_total", labels)) == 0, method


def test_the_alert_rules_raise_what_they_promise(promtool):
    for arguments in (["check", "rules", ALERTS.name], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run([promtool, *arguments], cwd=ALERTS.parent, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def expressions() -> list[str]:
    """Every expression of the alert rules and of the dashboard."""
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    targets = [target for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel.get("targets", ())]
    assert len(rules) > 10
    assert len(targets) > 20
    return [written["expr"] for written in rules + targets]


def test_the_alert_rules_and_the_dashboard_name_metrics_and_labels_that_there_are(fresh):
    operations, rows = Rest(fresh, "ops_addr"), metrics.documented(PAGE)
    # A gauge of hashes appears with the first one.
    fresh.client.newcomer()
    wait_until(
        "the queue was counted", lambda: ("postern_mail_queue", "state", "dead") in scrape(operations).label_values()
    )
    seen = scrape(operations)
    values = {"code": {code.name for code in grpc.StatusCode}, "method": {f"/{rpc}" for rpc in contract.rpcs()}}
    named = set()
    for expression in expressions():
        labels = {"instance", "le"}
        for name, selector in re.findall(r"\b(postern_\w+)(?:\{([^}]*)\})?", expression):
            family = re.sub("_bucket$", "", name)
            # That of a histogram appears with its first event.
            assert family in rows, expression
            assert rows[family].type == "histogram" or name in seen.types, expression
            named.add(family)
            labels |= set(rows[family].labels)
            for label, operator, value in re.findall(r'(\w+)(=~|!=|=)"([^"]*)"', selector):
                if label == "instance":
                    continue
                there = {value for metric, key, value in seen.label_values() if (metric, key) == (family, label)}
                there |= values.get(label, set())
                for wanted in value.split("|") if "(" not in value else [value]:
                    assert any(re.fullmatch(wanted, it) for it in there), f"{expression}: {label}{operator}{wanted}"
        for grouping in re.findall(r"by \(([^)]*)\)", expression):
            assert set(re.split(r",\s*", grouping)) <= labels, expression
    assert named == set(rows), "every metric is on the dashboard or in an alert"


def test_the_dashboard_is_one_that_grafana_and_prometheus_can_read(promtool, tmp_path):
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert (dashboard["uid"], dashboard["schemaVersion"]) == ("postern", 39)
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = {
        (p["gridPos"]["x"] + x, p["gridPos"]["y"] + y)
        for p in panels
        for x in range(p["gridPos"]["w"])
        for y in range(p["gridPos"]["h"])
    }
    assert len(places) == sum(p["gridPos"]["w"] * p["gridPos"]["h"] for p in panels), "no panel covers another one"
    assert max(x for x, _ in places) < 24
    known = {variable["name"] for variable in dashboard["templating"]["list"]}
    rules = []
    for number, expression in enumerate(expressions()):
        assert set(re.findall(r"\$(\w+)", expression)) <= known | {"__rate_interval"}, expression
        replaced = expression.replace("$__rate_interval", "5m").replace("$instance", ".*")
        rules.append({"record": f"expression:{number}", "expr": replaced})
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run([promtool, "check", "rules", file], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_first_reused_token_of_a_fresh_server_raises_its_alert(fresh, promtool, tmp_path):
    operations, client = Rest(fresh, "ops_addr"), fresh.client
    name, labels = "postern_refreshes_total", {"outcome": "reused"}
    before = scrape(operations).samples.get((name, frozenset(labels.items())), "_")
    _, first = client.newcomer()
    client.refresh(client.refresh(first.refresh_token).refresh_token)
    failure_of(lambda: client.refresh(first.refresh_token))
    after = scrape(operations).value(name, **labels)
    shutil.copy(ALERTS, tmp_path)
    (tmp_path / "test.yml").write_text(f"""
rule_files: [{ALERTS.name}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {{series: '{name}{{outcome="reused"}}', values: "{before}x4 {after}x9"}}
      - {{series: postern_database_up, values: "1x13"}}
    promql_expr_test:
      - expr: count by (alertname) (ALERTS{{alertstate="firing"}})
        eval_time: 9m
        exp_samples: [{{labels: '{{alertname="PosternRefreshTokenReused"}}', value: 1}}]
""")
    done = subprocess.run(
        [promtool, "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


@SQLITE_ALONE
def test_each_event_is_counted_once_whichever_way_it_came(server, rest, operations):
    person, tokens = rest.newcomer()
    before = scrape(operations)

    assert rest.get("/v1/me").status == 401
    failure_of(lambda: server.client.me("nonsense"))
    assert rest.get("/v1/me", token=tokens["accessToken"]).ok()
    rest.login(person)
    server.client.login(person)
    server.client.refresh(tokens["refreshToken"])

    after = scrape(operations)

    def grown(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    login = f"{pb.PACKAGE}.AuthService/Login"
    assert grown("postern_rpcs_total", method=ME, code="UNAUTHENTICATED") == 2
    assert grown("postern_rpcs_total", method=ME, code="OK") == 1
    assert grown("postern_rpc_duration_seconds_count", method=ME, code="UNAUTHENTICATED") == 2
    assert grown("postern_rpc_duration_seconds_count", method=ME, code="OK") == 1
    assert grown("postern_rpcs_total", method=login, code="OK") == 2
    assert grown("postern_sessions_opened_total") == 2
    assert grown("postern_hash_duration_seconds_count") == grown("postern_hash_wait_seconds_count") == 2
    assert grown("postern_refreshes_total", outcome="rotated") == 1
    assert after.value("postern_hash_queue_depth") == 0


def test_the_depth_of_the_hash_queue_rises_and_falls_again(embedded, start_server):
    # One hash at a time, slow enough on any machine for the others to wait, and quick enough for all to be answered.
    server = start_server(embedded, argon2_memory_kib=65536, argon2_iterations=3, hash_threads=1)
    rest, operations = Rest(server), Rest(server, "ops_addr")

    def depth() -> float:
        return scrape(operations).value("postern_hash_queue_depth")

    def attempt(person: Person) -> int:
        return rest.post("/v1/auth/login", {"email": person.email, "password": person.password}).status

    with ThreadPoolExecutor(4) as pool:
        logins = [pool.submit(attempt, Person()) for _ in range(4)]
        wait_until("some wait", lambda: depth() > 0, pause=0.01)
        assert {login.result() for login in logins} == {401}
    assert depth() == 0, "no call waits"


@SQLITE_ALONE
def test_strange_calls_make_no_new_labels(server, rest, operations):
    live_through_everything(server)
    before = scrape(operations).label_values()
    dice = random.Random(11)

    def stranger() -> str:
        return secrets.token_hex(dice.randint(1, 20))

    for number in range(200):
        rest.call(dice.choice(["GET", "POST", "PUT", "DELETE", stranger().upper()]), f"/{stranger()}/{stranger()}")
        rest.get("/v1/me", headers={"x-request-id": stranger(), "user-agent": stranger()}, token=stranger())
        path = f"/{pb.PACKAGE}.AuthService/{stranger()}" if number % 2 else f"/{stranger()}/{stranger()}"
        error = failure_of(lambda path=path: server.client.send_bytes(path, b"", metadata=[(stranger(), "x")]))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED

    assert scrape(operations).label_values() == before
    assert {value for _, label, value in before if label == "method"} <= {*contract.rpcs(), CHECK, "other"}
    assert {value for _, label, value in before if label == "code"} <= {code.name for code in grpc.StatusCode}


def test_no_address_name_id_or_token_is_in_the_metrics(server, operations):
    person, tokens = live_through_everything(server)
    claims = jose.claims_of(tokens["accessToken"])
    text = scrape(operations).text
    for private in (person.email, person.username, person.password, *tokens.values(), "127.0.0.1"):
        assert private not in text or private == "Bearer"
    for claim in ("sub", "sid", "jti"):
        assert claims[claim] not in text
    assert not server.secrets & set(text.replace('"', " ").split())


@SQLITE_ALONE
def test_the_committed_description_of_the_rest_api_is_fresh(server):
    printed = server.run("openapi")
    assert printed.returncode == 0, printed.stderr
    committed = (pb.REPOSITORY / "docs/openapi.json").read_text()
    assert printed.stdout == committed, "update it: postern openapi > docs/openapi.json"
