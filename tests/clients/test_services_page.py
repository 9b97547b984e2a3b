"""The commands of `docs/services.md` do what the page says: each is run, and its output is compared."""

import os
import re
import shutil
import subprocess

import pytest

from support import pb
from support.environment import own_environment
from support.http import address_of

PAGE = pb.REPOSITORY / "docs/services.md"
EVERY = "…"


def transcript() -> list[tuple[str, list[str]]]:
    """Each command of the page with the lines that it prints."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```", PAGE.read_text(), re.M | re.S):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            lines = part.splitlines()
            end = next(number for number, line in enumerate(lines) if not line.endswith("\\")) + 1
            found.append(("\n".join(lines[:end]), lines[end:]))
    return found


def matches(told: list[str], printed: list[str]) -> bool:
    patterns = [".*".join(map(re.escape, line.split(EVERY))) for line in told]
    return len(told) == len(printed) and all(map(re.fullmatch, patterns, printed))


@pytest.fixture
def tools(left_out) -> None:
    for tool in ("curl", "jq"):
        if not shutil.which(tool):
            left_out(f"the commands of {PAGE.name}: install {tool}")


def test_every_command_of_the_page_prints_what_the_page_says(embedded, start_server, binary, tools, tmp_path):
    server = start_server(embedded)
    directory = tmp_path / "shell"
    directory.mkdir()
    (directory / "postern").symlink_to(binary)
    environment = {**own_environment(**embedded.settings(), log="error"), "PATH": f"{directory}:{os.environ['PATH']}"}
    commands = transcript()
    assert len(commands) >= 8
    for command, told in commands:
        there = command.replace("127.0.0.1:8080", address_of(server, "http_addr"))
        ended = subprocess.run(
            ["bash", "-c", there], env=environment, cwd=directory, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60,
        )  # fmt: skip
        assert ended.returncode == 0, f"{command}\n{ended.stdout}"
        assert matches(told, ended.stdout.splitlines()), f"{command}\n{ended.stdout}"
