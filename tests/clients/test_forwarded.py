"""The address of a client behind a real nginx and a real HAProxy, whatever the client sends in X-Forwarded-For.

nginx appends to the line of the client (`$proxy_add_x_forwarded_for`). HAProxy adds a second line (`option
forwardfor`).
"""

import http.client
import json

import pytest

from support.client import Person
from support.http import Rest, address_of
from support.proxies import KINDS, Proxy, find

# The proxy reaches Postern from 127.0.0.1, and the client reaches the proxy from here.
CLIENT = "127.0.0.2"
# What a client sends, and who it is where its own address is that of a trusted proxy too.
SENT = {
    b"192.0.2.4": "192.0.2.4",
    b"192.0.2.4,": "192.0.2.4",
    b"192.0.2.5, , 127.0.0.1": "192.0.2.5",
    b"[2001:db8::3]": "2001:db8::3",
    b"[2001:db8::3]:4711": "2001:db8::3",
    b"192.0.2.7:4711": "192.0.2.7",
    b"\xc3\xa9\xff, 192.0.2.6": "192.0.2.6",
    b"\xc3\xa9\xff": CLIENT,
    b"unknown": CLIENT,
    b"": CLIENT,
    b" , ": CLIENT,
}


@pytest.mark.parametrize("kind", ["nginx", "HAProxy"])
@pytest.mark.parametrize("trusted", ["127.0.0.1/32", "127.0.0.0/8"])
def test_a_client_is_known_by_its_address_behind_a_proxy(embedded, start_server, kind, trusted, tmp_path, left_out):
    program = KINDS[kind][0]
    executable = find(program) or left_out(f"Postern behind {program}: run `scripts/tools {program}`")
    server = start_server(embedded, trusted_proxies=trusted)
    person = Person()
    server.client.sign_up(person)
    proxy = Proxy(kind, executable, address_of(server, "http_addr"), tmp_path).start()
    try:
        seen = {sent: client_ip(server, proxy.address, person, sent) for sent in SENT}
    finally:
        proxy.close()
    believes = trusted == "127.0.0.0/8"
    assert seen == {sent: address if believes else CLIENT for sent, address in SENT.items()}


def client_ip(server, proxy: str, person: Person, forwarded: bytes) -> str:
    """Logs in through the proxy, and returns the address of the new session."""
    host, _, port = proxy.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=15, source_address=(CLIENT, 0))
    body = json.dumps({"email": person.email, "password": person.password})
    connection.request(
        "POST", "/v1/auth/login", body, {"content-type": "application/json", "x-forwarded-for": forwarded}
    )
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    token = json.loads(answer.read())["tokens"]["accessToken"]
    connection.close()
    sessions = Rest(server).get("/v1/me/sessions", token=token).ok()["sessions"]
    return next(session["clientIp"] for session in sessions if session.get("current"))
