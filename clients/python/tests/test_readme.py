"""Runs the snippets of the README, one after the other, against the real server."""

import asyncio
import re
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from support import Stage

README = Path(__file__).parents[1] / "README.md"


def test_the_snippets_do_what_the_page_says(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    account = stage.account()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERSON_EMAIL", account["email"])
    monkeypatch.setenv("PERSON_PASSWORD", account["password"])
    names: dict[str, Any] = {}
    snippets = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(snippets) == 8
    for snippet in snippets:
        exec(compile(snippet, str(README), "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    roles = ("user",)
    assert printed == ["eyJ", f"user {account['username']} {roles}", "True", "ask for the password again"]
    stored = tmp_path / "refresh-token"
    assert (stored.stat().st_mode & 0o777, len(stored.read_text()) > 100) == (0o600, True)

    bearer = {"authorization": f"Bearer {names['person'].token()}"}
    assert get(names["protected"], bearer).text == f"hello {account['username']}"
    assert get(names["api"], bearer).json() == [f"an order of {account['username']}"]
    assert get(names["protected"], {}).status_code == get(names["api"], {}).status_code == 401
    assert served(names["server"], names["list_orders"], bearer) == f"the orders of {account['username']}"
    names["feed"].close()
    names["postern"].close()


def get(app: Any, headers: dict[str, str]) -> httpx.Response:
    async def request() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://orders") as client:
            return await client.get("/orders", headers=headers)

    return asyncio.run(request())


def served(server: grpc.Server, behavior: Any, headers: dict[str, str]) -> str:
    handler = grpc.unary_unary_rpc_method_handler(behavior)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("orders.v1.Orders", {"List": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        answer = channel.unary_unary("/orders.v1.Orders/List", None, None)(b"", metadata=tuple(headers.items()))
    server.stop(0).wait()
    return bytes(answer).decode()
