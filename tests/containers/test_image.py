"""The image alone: what is in it, with which rights it runs, how it stops, and how large it is."""

import gzip
import io
import json
import os
import re
import subprocess
import tarfile
import tomllib

import pytest
from containers import DATA, docker, execute, inspect, status_of
from support import pb
from support.client import Person

MASTER_KEY = "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVphYmNkZWY="
MAXIMUM_MIB = 30
# Docker kills after these unless it is told otherwise. An idle server takes little more than the second of its lame
# duck, which is printed: how long a busy machine takes says nothing about it.
STOP_SECONDS = 10
# Every file of the image, as a pattern. Libraries and packages have the names that this architecture gives them.
FILES = [
    r"usr/local/bin/postern",
    r"lib(64|/[\w-]+)/(ld-linux[\w.-]*|libc|libm|libgcc_s)\.so\.\d+",
    r"etc/(debian_version|os-release|nsswitch\.conf|passwd|group)",
    r"etc/ssl/certs/ca-certificates\.crt",
    r"var/lib/dpkg/status\.d/(libc6|libgcc-s1|ca-certificates)",
    r"usr/share/doc/(libc6|libgcc-s1|ca-certificates|postern)/copyright",
]
# What an engine makes in each container.
OF_THE_ENGINE = {".dockerenv", "etc/hostname", "etc/hosts", "etc/mtab", "etc/resolv.conf", "dev/console"}
NOBODY = 10001


@pytest.fixture(scope="module")
def members(image):
    """The files and directories of the image, by path."""
    container = docker("create", image)
    try:
        exported = execute_bytes("docker", "export", container)
    finally:
        docker("rm", container)
    with tarfile.open(fileobj=io.BytesIO(exported)) as archive:
        return {member.name.strip("/"): member for member in archive}


def execute_bytes(*command: str) -> bytes:
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=120).stdout


def test_the_image_holds_the_binary_and_what_it_needs(members):
    files = {name for name, member in members.items() if not member.isdir()} - OF_THE_ENGINE
    unexpected = {name for name in files if not any(re.fullmatch(pattern, name) for pattern in FILES)}
    assert not unexpected, "an image with more than it needs gives more to whoever breaks in"
    for pattern in FILES:
        assert any(re.fullmatch(pattern, name) for name in files), f"nothing is called {pattern}"


def test_only_the_data_directory_belongs_to_the_user_and_nothing_raises_rights(members):
    belonging = {name for name, member in members.items() if NOBODY in (member.uid, member.gid)}
    assert belonging == {"var/lib/postern"}
    assert members["var/lib/postern"].mode & 0o7777 == 0o700
    for name, member in members.items():
        if name.split("/")[0] not in ("dev", "proc", "sys"):
            assert not member.mode & 0o6000, f"{name} is setuid or setgid"
            assert member.issym() or not member.mode & 0o022, f"{name} may be written by others"


def test_the_image_says_what_it_is_and_leaves_no_volumes_behind(image):
    config = inspect(image)["Config"]
    assert config["User"] == "10001:10001", "a number, for Kubernetes's runAsNonRoot"
    assert not config.get("Volumes"), "every `docker run` would leave nameless ones behind"
    assert set(config["ExposedPorts"]) == {"50051/tcp", "8080/tcp", "9090/tcp"}
    assert (config["Entrypoint"], config["Cmd"]) == (["postern"], ["serve"])
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    version = tomllib.loads((pb.REPOSITORY / "Cargo.toml").read_text())["package"]["version"]
    assert (labels["title"], labels["version"], labels["licenses"]) == ("Postern", version, "Apache-2.0")
    assert re.fullmatch(r"[0-9a-f]{40}", labels["revision"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", labels["created"])


def test_the_image_is_small(image, whole, out):
    archive = out / "postern.tar.gz"
    saved = execute_bytes("docker", "save", image)
    with gzip.open(archive, "wb", compresslevel=6) as compressed:
        compressed.write(saved)
    mebibytes, size = archive.stat().st_size / 2**20, inspect(image)["Size"] / 1e6
    layers = len(inspect(image)["RootFS"]["Layers"])
    print(f"\nthe image: {mebibytes:.1f} MiB compressed, {size:.1f} MB uncompressed, {layers} layers")
    # A debug build is larger, and nobody runs it.
    assert mebibytes <= MAXIMUM_MIB or not whole


def test_it_serves_without_rights_on_a_read_only_root_and_stops_at_once(run):
    volumes = docker("volume", "ls", "--quiet")
    server = run(options=[DATA, "--pids-limit=256", "--memory=512m"]).ready()
    person, tokens = server.client.newcomer()
    assert server.client.me(tokens.access_token).username == person.username
    assert server.execute("postern", "healthcheck").stdout.strip() == "SERVING"
    status = status_of(server.id)
    assert status["Uid"].split() == status["Gid"].split() == ["10001"] * 4
    assert {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1"
    # Where the working directory is writable, a backup needs no more than a name.
    assert server.execute("postern", "backup", "copy.db").returncode == 0
    code, seconds = server.terminate(grace=30)
    print(f"\nSIGTERM while idle: exit code {code} after {seconds:.1f} s, {status['Threads'].strip()} threads before")
    assert code == 0
    assert seconds < STOP_SECONDS
    assert docker("volume", "ls", "--quiet") == volumes


def test_an_open_watch_does_not_keep_it_from_stopping_in_time(run):
    """The grace is that of docker-compose.yml. `docker stop` kills the process after it, which the exit code tells."""
    server = run(options=[DATA]).ready()
    watch = server.client.watch_health()
    assert next(watch).status == 1
    code, seconds = server.terminate(grace=40)
    print(f"\nSIGTERM with a Watch open: exit code {code} after {seconds:.1f} s")
    assert code == 0


def test_sigterm_ends_it_while_it_waits_for_its_database(run):
    server = run(database_url="postgres://postern@192.0.2.1/postern?sslmode=disable", master_key=MASTER_KEY)
    server.wait_for_log("database")
    code, seconds = server.terminate(grace=2 * STOP_SECONDS)
    print(f"\nSIGTERM while it waits for its database: exit code {code} after {seconds:.1f} s")
    assert code == 0, "137 if it had to be killed"
    assert seconds < STOP_SECONDS


@pytest.mark.parametrize(
    ("owner", "group", "mode", "options", "readable"),
    [
        pytest.param(0, 0, 0o600, [], False, id="of root alone"),
        pytest.param(NOBODY, 0, 0o400, [], True, id="of the user"),
        pytest.param(0, 20001, 0o440, ["--group-add=20001"], True, id="of a group that the container has"),
    ],
)
def test_a_secret_is_a_file_that_its_user_may_read(run, tmp_path, owner, group, mode, options, readable):
    """The ways that docs/deployment.md shows, and what is said to whoever knows none of them."""
    secret = tmp_path / "master.key"
    secret.write_text(MASTER_KEY)
    os.chown(secret, owner, group)
    secret.chmod(mode)
    mounted = f"--volume={secret}:/run/secrets/master.key:ro"
    server = run(options=[DATA, mounted, *options], master_key_file="/run/secrets/master.key")
    if readable:
        server.ready().client.sign_up(Person())
        assert "other users can read" not in server.log()
    else:
        assert server.exit_code() == 2, "a wrong setting, which a restart does not mend"
        assert "/run/secrets/master.key belongs to user 0 and has mode 0600" in server.log()
        assert "runs as user 10001" in server.log()


def test_scanners_find_what_the_image_is_made_of(image, whole, out, tmp_path):
    """The list is left for whoever publishes the image."""
    archive, listed = tmp_path / "image.tar", out / "sbom.cdx.json"
    docker("save", f"--output={archive}", image)
    execute("syft", "scan", f"docker-archive:{archive}", f"--output=cyclonedx-json={listed}", "--quiet")
    components = {
        (entry["name"], entry["version"])
        for entry in json.loads(listed.read_text())["components"]
        if "version" in entry
    }
    names = {name for name, _ in components}
    assert {"libc6", "libgcc-s1", "ca-certificates"} <= names
    locked = tomllib.loads((pb.REPOSITORY / "Cargo.lock").read_text())["package"]
    found = {(package["name"], package["version"]) for package in locked} & components
    print(f"\nthe list: {len(components)} components, {len(found)} of them crates")
    if whole:
        assert {"postern", "tokio", "tonic", "rustls", "aws-lc-sys", "sqlx-postgres"} <= {name for name, _ in found}
