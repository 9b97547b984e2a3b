"""`scripts/readme --self-test`: runs the runner on pages whose outcome is known.

Each case is a page, the counts it must give and something its report must say. A runner that passed everything would
make the README's promise empty, so most of these are pages that must fail.
"""

import contextlib
import io
import os
import tempfile
import time
from pathlib import Path

SERVER = "echo $BASHPID >pid; echo up; while :; do sleep 0.1; done"

PAGES = {
    "what is printed matches, and variables stay": (
        "```console\n$ word=hello\n$ echo $word; echo error >&2\nhello\nerror\n```\n"
        "```console\n$ echo $word \\\n    again\nhello again\n```\n",
        (2, 0, 0), "passed",
    ),
    "a command goes on over lines that start with >": (
        "```console\n$ cat <<END\n> one\n>\n> two\n> END\none\n\ntwo\n```\n", (1, 0, 0), "passed",
    ),
    "an ellipsis stands for a part of a line": (
        '```console\n$ echo "id: 0193 (new)"\nid: … (new)\n```\n', (1, 0, 0), "passed",
    ),
    "an ellipsis stands for any number of lines": (
        "```console\n$ seq 9\n1\n…\n8\n…\n9\n  …\n```\n", (1, 0, 0), "passed",
    ),
    "an ellipsis stands for a part of a line, not for a different one": (
        '```console\n$ echo "id: 0193 (old)"\nid: … (new)\n```\n', (0, 1, 0), "actual:   id: 0193 (old)",
    ),
    "a mismatch fails and shows the first line that differs": (
        "```console\n$ seq 3\n1\ntwo\n3\n```\n", (0, 1, 0), "line 2 of the output differs (exit status 0)\n  expected: two",
    ),
    "a line that is missing after an ellipsis fails": (
        "```console\n$ seq 3\n1\n…\n4\n```\n", (0, 1, 0), "expected: 4\n  actual:   (no more output)",
    ),
    "output that the page does not show fails": (
        "```console\n$ seq 2\n1\n```\n", (0, 1, 0), "expected: (no more output)\n  actual:   2",
    ),
    "a command that fails fails": ("```console\n$ false\n```\n", (0, 1, 0), "exit status 1, not 0"),
    "a command may be shown failing": (
        "<!-- readme: exit 3 -->\n```console\n$ (echo no; exit 3)\nno\n```\n", (1, 0, 0), "passed",
    ),
    "a command shown failing must fail": (
        "<!-- readme: exit 3 -->\n```console\n$ true\n```\n", (0, 1, 0), "exit status 0, not 3",
    ),
    "a command that ends the shell fails": ("```console\n$ exit 0\n```\n", (0, 1, 0), "the shell ended"),
    "what follows a failure is not run": (
        "```console\n$ false\n```\n```console\n$ touch run\n```\n", (0, 1, 1), "FAILED",
    ),
    "a section starts with a shell and a tree of its own": (
        "## One\n```console\n$ word=hello; touch file\n```\n### Still one\n```console\n$ echo $word; ls\nhello\nfile\n```\n"
        "## Two\n```console\n$ echo [$word]; ls\n[]\n```\n",
        (3, 0, 0), "Two",
    ),
    "a skipped block gives its reason": (
        "<!-- readme: skip (needs a Docker engine, which CI lacks) -->\n```console\n$ false\n```\n",
        (0, 0, 1), "skipped (needs a Docker engine, which CI lacks)",
    ),
    "a block becomes a file": (
        "<!-- readme: save as sub/hello.py -->\n```python\nif True:\n    print('hi')\n```\n"
        "```console\n$ python3 sub/hello.py\nhi\n```\n",
        (2, 0, 0), "passed",
    ),
    "a block in a list is a block": ("1. Do\n\n   ```console\n   $ echo hi\n   hi\n   ```\n", (1, 0, 0), "passed"),
    "other languages are not run": ("```sh\nfalse\n```\n```console\n$ true\n```\n", (1, 0, 0), "passed"),
    "a background command stays, is compared as far as shown, and is ended": (
        f'<!-- readme: background, wait for "u…p" -->\n```console\n$ {SERVER.replace("echo up", "echo u-p; echo later")}\nu-…\n```\n'
        "```console\n$ kill -0 $(cat pid)\n```\n",
        (2, 0, 0), "passed",
    ),
    "a background command is stopped as by Ctrl-C": (
        f'<!-- readme: background, wait for "up" -->\n```console\n$ trap "echo bye >bye; exit" INT; {SERVER}\n```\n'
        "<!-- readme: stop -->\n\n```console\n$ cat bye\nbye\n$ kill -0 $(cat pid)\n…\n```\n",
        (2, 1, 0), "exit status 1, not 0",
    ),
    "a background command that prints something else fails": (
        f'<!-- readme: background, wait for "up" -->\n```console\n$ {SERVER}\ndown\n```\n', (0, 1, 0), "expected: down",
    ),
    "a background command that ends too early fails": (
        '<!-- readme: background, wait for "up" -->\n```console\n$ echo no such flag\n```\n', (0, 1, 0), "| no such flag",
    ),
    "a background command that never gets ready fails": (
        f'<!-- readme: background, wait for "ready", timeout 1s -->\n```console\n$ {SERVER}\n```\n',
        (0, 1, 0), 'did not print "ready"',
    ),
    "a command that does not end fails": (
        "<!-- readme: timeout 1s -->\n```console\n$ echo $BASHPID >pid; echo so far; sleep 600\n```\n",
        (0, 1, 0), "| so far",
    ),
}  # fmt: skip

BAD_PAGES = {
    "an unknown directive is refused": "<!-- readme: backround -->\n```console\n$ true\n```\n",
    "a directive that directs nothing is refused": "<!-- readme: skip (x) -->\ntext\n```console\n$ true\n```\n",
    "a directive for a block that is not run is refused": "<!-- readme: exit 1 -->\n```sh\n$ true\n```\n",
    "a transcript without a command is refused": "```console\ncargo build\n```\n",
    "a background block that waits for nothing is refused": "<!-- readme: background -->\n```console\n$ true\n```\n",
    "a block without an end is refused": "```console\n$ true\n",
}


def outcome(run_page, page: str) -> tuple[tuple[int, int, int], str, list[int]]:
    """The page's counts, the report, and the processes named in `pid` files that are still there."""
    pids = []

    @contextlib.contextmanager
    def empty_tree():
        with tempfile.TemporaryDirectory() as tree:
            yield Path(tree)
            pids.extend(int(file.read_text()) for file in Path(tree).glob("pid"))

    report = io.StringIO()
    with contextlib.redirect_stdout(report):
        counts = run_page("page", page, empty_tree, dict(os.environ))
    time.sleep(0.1)
    return counts, report.getvalue(), [pid for pid in pids if is_running(pid)]


def is_running(pid: int) -> bool:
    """Zombies, which only their new parent can clear away, do not count."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat")
        return not Path("/proc/self").exists() or stat.read_text().rpartition(") ")[2][0] != "Z"
    return False


def run(read_page, run_page, bad_page) -> int:
    passed = failed = 0

    def check(name: str, right: bool, detail: str) -> None:
        nonlocal passed, failed
        passed, failed = passed + right, failed + (not right)
        if not right:
            print(f"FAILED: {name}\n{detail}")

    for name, (page, counts, says) in PAGES.items():
        actual, report, alive = outcome(run_page, page)
        check(name, actual == counts and says in report and not alive, f"{actual}, still alive: {alive}\n{report}")
    for name, page in BAD_PAGES.items():
        try:
            check(name, False, f"read as {read_page(page)}")
        except bad_page:
            passed += 1
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0
