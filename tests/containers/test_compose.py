"""docker-compose.yml: brought up with two replicas and Envoy, used, put through an outage, and taken down again."""

import json
import os
import secrets
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from containers import COMMAND_DEADLINE, docker, execute, inspect
from support import pb
from support.client import Client, Person
from support.mail import LINK, TOKEN
from support.wait import wait_until

# That of the compose file.
GRACE_SECONDS = 40
REPLICAS = 2
MINIMUM_CALLS = 20

pytestmark = pytest.mark.timeout(COMMAND_DEADLINE + 200)


class Stack:
    """One project of Compose. Nothing of it has a name or a port that somebody else's could have."""

    def __init__(self, image: str, directory: Path):
        # Docker picks the ports. The image is the one under test, under its own name.
        override = directory / "override.yml"
        override.write_text(json.dumps({"services": {name: {"image": image} for name in ("migrate", "postern")}}))
        self.project = f"postern-check-{secrets.token_hex(4)}"
        self._files = ["--file", str(pb.REPOSITORY / "docker-compose.yml"), "--file", str(override)]
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("POSTERN_")},
            "POSTERN_MASTER_KEY": "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVphYmNkZWY=",
            "POSTGRES_PASSWORD": secrets.token_hex(16),
            **{f"{name}_PORT": "0" for name in ("GRPC", "HTTP", "OPS", "MAIL", "PROXY")},
        }
        self._clients: dict[str, Client] = {}

    def compose(self, *arguments: str, **options) -> str:
        """The output of a `docker compose` command. No `.env` is read."""
        command = [
            "docker-compose",
            "--project-name",
            self.project,
            "--env-file",
            "/dev/null",
            *self._files,
            "--profile",
            "envoy",
        ]
        return execute(*command, *arguments, env=self._environment, **options).stdout.strip()

    def up(self) -> None:
        self.compose("up", "--detach", "--no-build", "--pull=never", f"--scale=postern={REPLICAS}")

    def down(self) -> None:
        for client in self._clients.values():
            client.close()
        self.compose("down", "--volumes")

    def wait_until_ready(self) -> None:
        for index in range(1, REPLICAS + 1):
            asked = partial(self.get, "postern", 9090, "/readyz", index)
            wait_until(f"replica {index} is ready", lambda asked=asked: asked()[0] == 200)

    def address(self, service: str, port: int, index: int = 1) -> str:
        return self.compose("port", f"--index={index}", service, str(port))

    def client(self, service: str, port: int, index: int = 1) -> Client:
        address = self.address(service, port, index)
        if address not in self._clients:
            self._clients[address] = Client(address)
        return self._clients[address]

    def replica(self, index: int) -> Client:
        return self.client("postern", 50051, index)

    def get(self, service: str, port: int, path: str, index: int = 1) -> tuple[int, bytes]:
        request = urllib.request.Request(f"http://{self.address(service, port, index)}{path}")
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError:
            return 0, b""

    def containers(self, service: str) -> list[dict]:
        ids = self.compose("ps", "--all", "--quiet", service).split()
        return sorted((inspect(name) for name in ids), key=lambda container: container["Name"])


@pytest.fixture(scope="module")
def stack(image, tmp_path_factory):
    stack = Stack(image, tmp_path_factory.mktemp("compose"))
    try:
        stack.up()
        stack.wait_until_ready()
        wait_until("Envoy knows a replica", lambda: stack.get("envoy", 8000, "/.well-known/jwks.json")[0] == 200)
    except AssertionError:
        print(stack.compose("logs", check=False))
        stack.down()
        raise
    yield stack
    if stack.containers("postern"):
        stack.down()


def test_a_person_signs_up_reads_the_mail_and_uses_every_replica(stack):
    person = Person()
    user = stack.client("envoy", 8000).sign_up(person)
    tokens = stack.replica(1).login(person)
    assert stack.replica(2).me(tokens.access_token).id == user.id

    def mail() -> str | None:
        listed = json.loads(stack.get("mailpit", 8025, f"/api/v1/search?query=to:{person.email}")[1])["messages"]
        return (
            json.loads(stack.get("mailpit", 8025, f"/api/v1/message/{listed[0]['ID']}")[1])["Text"] if listed else None
        )

    text = wait_until("the mail arrives", mail)
    link = next(link for link in LINK.findall(text) if TOKEN.search(link))
    assert urlsplit(link).path.endswith("verify-email")
    assert stack.replica(2).verify_email(TOKEN.search(link)[0], tokens.access_token).email_verified
    # REST, on the same port of Envoy as gRPC.
    status, body = stack.get("envoy", 8000, "/.well-known/jwks.json")
    assert (status, len(json.loads(body)["keys"]) > 0) == (200, True)
    stack.replica(1).logout(tokens.refresh_token)


def test_the_first_admin_is_made_as_the_file_says(stack):
    command = ["postern", "user", "create", "--username", "root", "--email", "root@example.com", "--role", "admin"]
    # A command waits for its database for a second, which is short on a busy machine. Nothing is created then.
    made = wait_until(
        "the admin is created",
        lambda: stack.compose("exec", "-T", "postern", *command, input="an unlikely password for root\n"),
    )
    assert "admin,user" in made


def test_the_migration_gets_no_secret_that_it_does_not_need(stack):
    (migrate,) = stack.containers("migrate")
    assert migrate["State"]["ExitCode"] == 0
    settings = {variable.partition("=")[0] for variable in migrate["Config"]["Env"]}
    assert "POSTERN_DATABASE_URL" in settings
    assert "POSTERN_MASTER_KEY" not in settings


def test_every_container_is_limited(stack):
    for service in ("postern", "migrate", "postgres", "mailpit", "envoy"):
        for container in stack.containers(service):
            host = container["HostConfig"]
            assert host["Memory"] == 512 * 2**20, service
            assert host["NanoCpus"] == 10**9, service
            assert host["PidsLimit"] == 256, service
            assert host["SecurityOpt"] == ["no-new-privileges:true"], service
            if service != "postgres":
                assert (host["ReadonlyRootfs"], host["CapDrop"]) == (True, ["ALL"]), service


def test_the_ports_are_those_of_the_readme_unless_others_are_chosen(stack):
    settings = {"POSTGRES_PASSWORD": "x", "POSTERN_MASTER_KEY": "x", "PATH": os.environ["PATH"], "HOME": "/"}
    command = ["docker-compose", "--env-file", "/dev/null", "--file", pb.REPOSITORY / "docker-compose.yml", "config"]
    services = json.loads(execute(*command, "--format=json", env=settings).stdout)["services"]
    published = {
        port["published"]: port["host_ip"] for service in services.values() for port in service.get("ports", [])
    }
    assert published == dict.fromkeys(("50051", "8080", "9090", "8025"), "127.0.0.1")
    assert len({stack.address("postern", 50051, index) for index in (1, 2)}) == REPLICAS


def test_an_outage_of_the_database_restarts_no_replica(stack):
    before = [container["State"]["StartedAt"] for container in stack.containers("postern")]
    stack.compose("stop", "postgres")
    for index in (1, 2):
        wait_until("it is not ready", lambda index=index: stack.get("postern", 9090, "/readyz", index)[0] == 503)
        assert stack.get("postern", 9090, "/livez", index)[0] == 200
    for container in stack.containers("postern"):
        assert docker("exec", container["Id"], *container["Config"]["Healthcheck"]["Test"][1:]) == "NOT_SERVING"
    for number in range(REPLICAS):
        # The engine asks every ten seconds, and may not have asked yet.
        wait_until("the engine finds it healthy", lambda number=number: health(stack, number) == "healthy")
    stack.compose("start", "postgres")
    stack.wait_until_ready()
    assert [container["State"]["StartedAt"] for container in stack.containers("postern")] == before


def health(stack, number: int) -> str:
    return stack.containers("postern")[number]["State"]["Health"]["Status"]


def test_no_call_fails_while_a_replica_stops_behind_envoy(stack):
    """A replica that stops says so for a second before it refuses calls, and Envoy asks for the health meanwhile."""
    proxy = stack.client("envoy", 8000)
    _, tokens = proxy.newcomer()
    stopping = stack.containers("postern")[0]["Id"]
    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(docker, "stop", f"--time={GRACE_SECONDS}", stopping)
        calls = 0
        while not stopped.done() or calls < MINIMUM_CALLS:
            proxy.me(tokens.access_token)
            calls += 1
        stopped.result()
    print(f"\n{calls} calls through Envoy while a replica stopped, none failed")
    docker("start", stopping)
    stack.wait_until_ready()


def test_it_goes_down_in_peace_and_leaves_nothing(stack):
    """The last one: it ends the stack."""
    stack.compose("stop")
    codes = [container["State"]["ExitCode"] for container in stack.containers("postern")]
    assert codes == [0] * REPLICAS
    stack.down()
    label = f"label=com.docker.compose.project={stack.project}"
    left = [
        docker(kind, "ls", "--quiet", "--filter", label, *more)
        for kind, *more in (("container", "--all"), ("volume",), ("network",))
    ]
    assert left == ["", "", ""]
