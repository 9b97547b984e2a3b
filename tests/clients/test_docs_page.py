"""The page of the API in a real browser, and the addresses that lead to other pages.

Its scripts run here. One engine is enough.
"""

import gzip
from urllib.parse import urljoin

import pytest

from support import contract
from support.browser import PHONE
from support.http import Rest
from support.wait import wait_until

pytestmark = pytest.mark.parametrize("server", ["sqlite"], indirect=True, scope="module")

FILES = ("/docs", "/docs/start.js", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css")


@pytest.mark.parametrize("size", [(1280, 800), PHONE], ids=["desktop", "phone"])
def test_the_page_shows_every_operation_and_loads_nothing_from_elsewhere(server, browser, size):
    page = browser.page(size, scripts=True)
    own = f"http://{Rest(server).address}/"
    page.open(own)
    assert page.url.rstrip("/") == f"{own}docs", "the root leads to the page"
    count = "document.querySelectorAll('.opblock').length"
    wait_until("the operations are shown", lambda: page.evaluate(count) == len(contract.routes()))
    shown = page.text
    for route in contract.routes():
        assert route.template in shown.replace("\u200b", ""), route
    assert not page.complaints(), "the policy had nothing to block"
    assert all(url.startswith((own, "data:", "about:")) for url in page.requests()), page.requests()
    page.close()


def test_a_call_can_be_tried_from_the_page(server, browser):
    page = browser.page(scripts=True)
    page.open(f"http://{Rest(server).address}/docs#/AuthService/GetMe")
    press = "(() => {{ const e = document.querySelector('{0}'); if (e) e.click(); return !!e; }})()"
    for button in (".try-out__btn", ".btn.execute"):
        wait_until(button, lambda button=button: page.evaluate(press.format(f"#operations-AuthService-GetMe {button}")))
    wait_until("the answer is shown", lambda: "TOKEN_MISSING" in page.text)
    page.close()


def test_the_policy_of_the_page_allows_its_own_files_and_nothing_else(server):
    for path in FILES:
        answer = Rest(server).get(path)
        assert answer.status == 200, path
        assert answer.header("x-content-type-options") == "nosniff"
        policy = answer.header("content-security-policy")
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        if answer.header("content-encoding") == "gzip":
            assert len(gzip.decompress(answer.body)) > len(answer.body)
        assert Rest(server).call("POST", path).status == 405


@pytest.mark.parametrize(("path", "place"), [("/", "/docs"), ("/.well-known/change-password", "/reset-password")])
def test_an_address_that_people_guess_leads_to_the_page(server, path, place):
    rest = Rest(server)
    for method in ("GET", "HEAD"):
        answer = rest.call(method, path)
        assert answer.status == 302
        # Relative, so that it holds behind a proxy that adds a prefix to every path.
        for before in ("", "/auth"):
            base = f"https://example.com{before}"
            assert urljoin(f"{base}{path}", answer.header("location")) == f"{base}{place}"
    assert rest.post(path, {}).status == 405
    # W3C: a password manager asks for something that cannot be there, to see whether the statuses can be trusted.
    absent = "/.well-known/resource-that-should-not-exist-whose-status-code-should-not-be-200"
    assert rest.get(absent).status == 404
