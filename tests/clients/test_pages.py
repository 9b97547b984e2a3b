"""The pages that mails link to, in a real browser without scripts.

It tests the three flows as a user sees them, and that the browser reports no problem with a page. The validity of the
tokens in the links is tested in `test_mail_tokens`.
"""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

import pytest

from support.browser import DESKTOP, PHONE, Page
from support.client import Person
from support.engine import Sqlite
from support.expect import expect_unauthenticated
from support.http import Rest, address_of
from support.mail import CHANGE, RESET, VERIFY
from support.refusal import expect_refusal
from support.server import Server

PATHS = tuple(f"/{kind}" for kind in (VERIFY, RESET, CHANGE))
FORM = {"content-type": "application/x-www-form-urlencoded"}
BUTTON = "button, input[type=submit]"
NEW, REPEAT = "input[name=new_password]", "input[name=repeat_password]"
NONSENSE = "A" * 64
# Two of these cover each size and each colour scheme once. The other two run only in nightly runs.
LOOKS = [
    pytest.param((PHONE, False), id="phone, light", marks=pytest.mark.nightly),
    pytest.param((PHONE, True), id="phone, dark"),
    pytest.param((DESKTOP, False), id="desktop, light"),
    pytest.param((DESKTOP, True), id="desktop, dark", marks=pytest.mark.nightly),
]
# The minimum contrast of text (WCAG 2.2, 1.4.3).
CONTRAST = 4.5


@pytest.fixture(params=LOOKS)
def page(request, browser):
    """A tab of each size and colour scheme. At the end of the test the browser must have reported no problem in it."""
    page = browser.page(*request.param)
    yield page
    assert not page.complaints()
    page.close()


@pytest.fixture
def desktop(browser):
    page = browser.page()
    yield page
    page.close()


@pytest.fixture(scope="module")
def site(binary, tmp_path_factory, mailbox):
    """A server that serves the pages to which the links in its mails lead."""
    directory = tmp_path_factory.mktemp("site")
    server = Server(
        binary, Sqlite(directory / "data"), directory, mail_url=mailbox.url, mail_limit_per_client="0",
        service_name="Otter Works",
    )  # fmt: skip
    try:
        server.start()
        yield server.restart(public_url=f"http://{address_of(server, 'http_addr')}")
    finally:
        server.close()


@dataclass(frozen=True)
class Someone:
    """A user with a link from a mail."""

    person: Person
    access_token: str
    link: str
    # The new address, if the link confirms a change of address.
    new_email: str = ""


def someone_with(site, mailbox, kind: str) -> Someone:
    """A new user with a link of this kind."""
    person, tokens = site.client.newcomer()
    verify = mailbox.take(person.email, VERIFY)
    if kind == VERIFY:
        return Someone(person, tokens.access_token, verify.link)
    if kind == RESET:
        site.client.request_password_reset(person.email)
        return Someone(person, tokens.access_token, mailbox.take(person.email, RESET).link)
    new_email = Person().email
    site.client.request_email_change(tokens.access_token, new_email, person.password)
    return Someone(person, tokens.access_token, mailbox.take(new_email, CHANGE).link, new_email)


@pytest.fixture
def keep(tmp_path, request):
    """Saves a screenshot of a page in the directory of the test, and in POSTERN_SCREENSHOTS if that is set."""
    look = re.sub(r"\W+", "-", request.node.callspec.id) if hasattr(request.node, "callspec") else "desktop"
    directories = [tmp_path]
    if chosen := os.environ.get("POSTERN_SCREENSHOTS"):
        Path(chosen).mkdir(parents=True, exist_ok=True)
        directories.append(Path(chosen))

    def keep(page: Page, name: str) -> None:
        for directory in directories:
            page.screenshot(directory / f"{name}-{look}.png")

    return keep


def expect_sound(page: Page, site, status: int) -> None:
    """Asserts what holds for every page: its headers, its width, its accessibility tree and its contrast."""
    document = page.document()
    assert document["status"] == status, page.text
    headers = document["headers"]
    assert headers["content-type"].lower() == "text/html; charset=utf-8"
    assert "no-store" in headers["cache-control"]
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-request-id"]
    assert "set-cookie" not in headers
    expect_strict(headers["content-security-policy"])

    own = f"http://{address_of(site, 'http_addr')}/"
    assert all(url.startswith(own) for url in page.requests() if url != "about:blank"), page.requests()
    assert page.evaluate("document.documentElement.scrollWidth") <= page.size[0], "the page does not scroll sideways"

    nodes = page.accessibility()
    headings = [node for node in nodes if node.role == "heading" and node.properties.get("level") == 1]
    assert len(headings) == 1, headings
    assert headings[0].name.strip()
    [root] = [node for node in nodes if node.role == "RootWebArea"]
    assert root.name.strip(), "the page has a title"
    assert page.evaluate("document.documentElement.lang"), "the page has a language"
    for node in nodes:
        if node.role in ("button", "textbox", "link"):
            assert node.name.strip(), f"a {node.role} without a name"
    faint = [shown for shown in page.evaluate(CONTRASTS) if shown[0] < CONTRAST]
    assert not faint, f"hard to read: {faint}"


def expect_strict(policy: str) -> None:
    """Asserts that a Content-Security-Policy lets a page only show itself and send its form to its own server."""
    directives = {name: set(rest) for name, *rest in (part.split() for part in policy.split(";") if part.strip())}
    assert directives["default-src"] == {"'none'"}
    assert directives["frame-ancestors"] == {"'none'"}
    assert directives["form-action"] == {"'self'"}
    assert directives["base-uri"] == {"'none'"}
    assert "script-src" not in directives or directives["script-src"] == {"'none'"}
    for sources in directives.values():
        assert not sources & {"'unsafe-inline'", "'unsafe-eval'", "*", "data:", "http:", "https:"}, policy


# Each text of the page with its contrast to the background, by the formula of WCAG.
CONTRASTS = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour[3] > 250) return colour;
    }
    return rgba(matchMedia('(prefers-color-scheme: dark)').matches
      && getComputedStyle(document.documentElement).colorScheme.includes('dark') ? '#121212' : '#ffffff');
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (texts.nextNode()) {
    const text = texts.currentNode.textContent.trim(), element = texts.currentNode.parentElement;
    if (!text || !element.getClientRects().length || ['STYLE', 'SCRIPT'].includes(element.tagName)) continue;
    const [a, b] = [rgba(getComputedStyle(element).color), behind(element)].map(light);
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), text]);
  }
  return found;
})()"""


def is_verified(site, someone: Someone) -> bool:
    # With a new session, because a verification on the page ends those from before.
    return site.client.me(site.client.login(someone.person).access_token).email_verified


# -- the three flows ----------------------------------------------------------------------------------------------


def test_an_address_is_verified_by_opening_the_link_and_pressing_the_button(site, mailbox, page, keep):
    someone = someone_with(site, mailbox, VERIFY)

    page.open(someone.link)
    expect_sound(page, site, 200)
    assert "Otter Works" in page.text
    assert not is_verified(site, someone), "opening the link changes nothing"
    keep(page, "verify")

    page.click(BUTTON)
    expect_sound(page, site, 200)
    assert is_verified(site, someone)
    keep(page, "verified")


def test_a_password_is_reset_by_typing_a_new_one_twice(site, mailbox, page, keep):
    someone = someone_with(site, mailbox, RESET)
    again = replace(someone.person, password=Person().password)

    page.open(someone.link)
    expect_sound(page, site, 200)
    keep(page, "reset")
    assert [node.properties.get("required") for node in page.accessibility() if node.role == "textbox"] == [True, True]

    # This password is too easy to guess. The page says so, and the link stays valid.
    for selector in (NEW, REPEAT):
        page.fill(selector, "password1")
    page.click(BUTTON)
    expect_sound(page, site, 400)
    assert "password" in page.text.lower()
    assert "password1" not in page.html()
    assert site.client.login(someone.person), "the password has not changed"
    keep(page, "reset-weak")

    # The second password differs from the first.
    page.fill(NEW, again.password)
    page.fill(REPEAT, f"{again.password}x")
    page.click(BUTTON)
    expect_sound(page, site, 400)
    assert again.password not in page.html(), "the page does not contain the typed password"
    assert site.client.login(someone.person)
    keep(page, "reset-differing")

    page.fill(NEW, again.password)
    page.fill(REPEAT, again.password)
    page.click(BUTTON)
    expect_sound(page, site, 200)
    assert site.client.login(again)
    expect_unauthenticated(lambda: site.client.login(someone.person), "INVALID_CREDENTIALS")
    keep(page, "reset-done")


def test_an_address_is_changed_by_opening_the_link_and_pressing_the_button(site, mailbox, page, keep):
    someone = someone_with(site, mailbox, CHANGE)

    page.open(someone.link)
    expect_sound(page, site, 200)
    assert site.client.me(someone.access_token).email == someone.person.email
    keep(page, "change")

    page.click(BUTTON)
    expect_sound(page, site, 200)
    assert site.client.me(someone.access_token).email == someone.new_email
    keep(page, "changed")


@pytest.mark.parametrize("kind", [VERIFY, RESET, CHANGE])
def test_a_dead_link_says_so(site, mailbox, page, keep, kind):
    page.open(f"http://{address_of(site, 'http_addr')}/{kind}?token={NONSENSE}")
    if page.document()["status"] == 200:
        # The token is checked only when the form is sent.
        password = Person().password
        for selector in (NEW, REPEAT) if kind == RESET else ():
            page.fill(selector, password)
        page.click(BUTTON)
    expect_sound(page, site, 400)
    assert NONSENSE not in page.html()
    keep(page, "dead")


def test_a_verification_link_that_is_pressed_twice_says_that_it_has_worked(site, mailbox, desktop):
    someone = someone_with(site, mailbox, VERIFY)
    token = someone.link.partition("token=")[2]
    headings = []
    for _ in range(3):
        desktop.open(someone.link)
        desktop.click(BUTTON)
        expect_sound(desktop, site, 200)
        headings.append(desktop.evaluate("document.querySelector('h1').innerText"))
    assert headings[1] == headings[2] != headings[0]
    assert "already confirmed" in headings[1]
    assert someone.person.email not in desktop.html(), "it says nothing of whose link it is"

    # Whoever changes one character of it, and whoever calls the RPC, learns nothing.
    changed = token[:-1] + ("A" if token[-1] != "A" else "B")
    answers = {}
    for name, tried in (("spent", token), ("changed", changed)):
        refused = Rest(site).post("/v1/email/verify", {"token": tried})
        answers[name] = expect_refusal(refused, 400, "ONE_TIME_TOKEN_INVALID")
    assert answers["spent"] == answers["changed"]
    desktop.open(someone.link.replace(token, changed))
    desktop.click(BUTTON)
    expect_sound(desktop, site, 400)

    # The account has another address: the link is about nothing any more.
    tokens = site.client.login(someone.person)
    new_email = Person().email
    site.client.request_email_change(tokens.access_token, new_email, someone.person.password)
    Rest(site).post("/v1/email/change", {"token": mailbox.token(new_email, CHANGE)}).ok()
    desktop.open(someone.link)
    desktop.click(BUTTON)
    expect_sound(desktop, site, 400)


def test_a_second_press_of_a_verification_link_ends_no_session(site, mailbox, desktop):
    someone = someone_with(site, mailbox, VERIFY)
    desktop.open(someone.link)
    desktop.click(BUTTON)
    tokens = site.client.login(someone.person)
    desktop.open(someone.link)
    desktop.click(BUTTON)
    assert site.client.me(tokens.access_token).email_verified


def test_a_link_to_change_the_address_is_dead_when_it_is_pressed_again(site, mailbox, desktop):
    someone = someone_with(site, mailbox, CHANGE)
    for status in (200, 400):
        desktop.open(someone.link)
        desktop.click(BUTTON)
        expect_sound(desktop, site, status)


def test_a_password_manager_leads_to_a_page_that_mails_a_link_for_a_new_password(site, mailbox, desktop, keep):
    someone = someone_with(site, mailbox, VERIFY)
    own = f"http://{address_of(site, 'http_addr')}"
    answers = []
    for email in (someone.person.email, Person().email):
        desktop.open(f"{own}/.well-known/change-password")
        assert desktop.url == f"{own}/{RESET}"
        expect_sound(desktop, site, 200)
        desktop.fill("input[name=email]", email)
        desktop.press("Enter", leads_on=True)
        expect_sound(desktop, site, 200)
        answers.append(desktop.text)
    assert answers[0] == answers[1], "it does not say whether there is such an account"
    keep(desktop, "asked")

    desktop.open(mailbox.take(someone.person.email, RESET).link)
    again = replace(someone.person, password=Person().password)
    for selector in (NEW, REPEAT):
        desktop.fill(selector, again.password)
    desktop.click(BUTTON)
    expect_sound(desktop, site, 200)
    assert site.client.login(again)

    desktop.open(f"{own}/{RESET}")
    desktop.fill("input[name=email]", "nobody")
    desktop.click(BUTTON)
    expect_sound(desktop, site, 400)
    assert "not an email address" in desktop.text


def test_a_page_of_somebody_else_cannot_ask_for_mails(site, mailbox):
    person = someone_with(site, mailbox, VERIFY).person
    for sender, status in (("cross-site", 400), ("same-site", 400), ("same-origin", 200), ("none", 200)):
        headers = {**FORM, "sec-fetch-site": sender}
        answer = Rest(site).call("POST", f"/{RESET}", urlencode({"email": person.email}), headers=headers)
        assert answer.status == status, sender
    # No other page takes an address.
    for kind in (VERIFY, CHANGE):
        assert Rest(site).call("POST", f"/{kind}", urlencode({"email": person.email}), headers=FORM).status == 400


# -- keyboard and assistive technology ----------------------------------------------------------------------------


def tab_to(page: Page, role: str) -> None:
    """Presses Tab until an element of this role has the focus."""
    for _ in range(10):
        page.press("Tab")
        focused = page.focused()
        if focused and focused.role == role:
            return
    raise AssertionError(f"Tab leads to no {role}: {page.accessibility()}")


@pytest.mark.parametrize("kind", [VERIFY, CHANGE])
def test_the_keyboard_is_enough_to_press_the_button(site, mailbox, desktop, kind):
    someone = someone_with(site, mailbox, kind)
    desktop.open(someone.link)
    tab_to(desktop, "button")
    assert desktop.evaluate(OUTLINE), "the focus is visible"
    desktop.press("Enter", leads_on=True)
    expect_sound(desktop, site, 200)
    reader = replace(someone.person, email=someone.new_email or someone.person.email)
    account = site.client.me(site.client.login(reader).access_token)
    assert account.email_verified
    assert account.email == reader.email


# Whether the focused element has a visible outline.
OUTLINE = """(() => {
  const style = getComputedStyle(document.activeElement);
  return (style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) > 0) || style.boxShadow !== 'none';
})()"""


def test_the_keyboard_is_enough_to_reset_a_password(site, mailbox, desktop):
    someone = someone_with(site, mailbox, RESET)
    again = replace(someone.person, password=Person().password)
    desktop.open(someone.link)
    if not (desktop.focused() and desktop.focused().role == "textbox"):
        tab_to(desktop, "textbox")
    names = [desktop.focused().name]
    desktop.type(again.password)
    tab_to(desktop, "textbox")
    names.append(desktop.focused().name)
    desktop.type(again.password)
    tab_to(desktop, "button")
    desktop.press("Enter", leads_on=True)
    expect_sound(desktop, site, 200)
    assert len(set(names)) == 2, "the two fields have different names"
    assert site.client.login(again)


def test_password_managers_are_told_what_is_typed(site, mailbox, desktop):
    desktop.open(someone_with(site, mailbox, RESET).link)
    for selector in (NEW, REPEAT):
        kind = desktop.evaluate(f"[...document.querySelectorAll('{selector}')].map(i => [i.type, i.autocomplete])")
        assert kind == [["password", "new-password"]]


def test_a_refused_password_is_told_where_it_was_typed(site, mailbox, desktop):
    desktop.open(someone_with(site, mailbox, RESET).link)
    desktop.fill(NEW, "password1")
    desktop.fill(REPEAT, "password1")
    desktop.click(BUTTON)
    [field, *_] = [node for node in desktop.accessibility() if node.role == "textbox"]
    assert field.properties.get("invalid") == "true", field
    described = desktop.evaluate(
        f"document.querySelector('{NEW}').getAttribute('aria-describedby').split(' ')"
        ".map(id => document.getElementById(id).innerText).join(' ')"
    )
    assert described.strip(), "the field has a description of the error"


def test_light_and_dark_are_not_the_same(site, browser):
    url = f"http://{address_of(site, 'http_addr')}/verify-email?token={NONSENSE}"
    seen = []
    for dark in (False, True):
        page = browser.page(DESKTOP, dark)
        page.open(url)
        seen.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.close()
    assert seen[0] != seen[1]


# -- misuse -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "token",
    [
        '"><script>alert(1)</script>',
        "'onmouseover='alert(1)",
        "&lt;b&gt;",
        "{{7*7}}",
        "javascript:alert(1)",
        "x" * 3000,
    ],
    ids=ascii,
)
def test_what_stands_in_a_link_is_text_also_where_scripts_run(site, browser, path, token):
    page = browser.page(scripts=True)
    page.open(f"http://{address_of(site, 'http_addr')}{path}?token={quote(token)}&{quote(token)}={quote(token)}")
    assert not page.complaints(), "the policy had nothing to block"
    assert page.evaluate("document.scripts.length") == 0
    expect_strict(page.document()["headers"]["content-security-policy"])
    page.close()


def test_a_service_by_a_strange_name_is_text(embedded, start_server, browser):
    name = "<b>Otters</b> & <script>alert(1)</script>"
    server = start_server(embedded, service_name=name, mail_from="post@example.com")
    page = browser.page(scripts=True)
    page.open(f"http://{address_of(server, 'http_addr')}/verify-email?token={NONSENSE}")
    assert name in page.text
    assert not page.complaints()
    page.close()


@pytest.mark.parametrize("path", PATHS)
def test_a_form_that_no_page_of_ours_sends_is_refused(site, path):
    rest = Rest(site)
    body = urlencode({"token": NONSENSE, "new_password": "x" * 20, "repeat_password": "x" * 20})
    statuses = {
        "as it should be, but for the token": (rest.call("POST", path, body, headers=FORM).status, 400),
        "JSON": (rest.post(path, {"token": NONSENSE}).status, 415),
        "nothing": (rest.call("POST", path, "", headers=FORM).status, 400),
        "no token": (rest.call("POST", path, "a=b", headers=FORM).status, 400),
        "two tokens": (rest.call("POST", path, f"token={NONSENSE}&{body}", headers=FORM).status, 400),
        "too much": (rest.call("POST", path, f"{body}&a={'x' * 70_000}", headers=FORM).status, 413),
        "no UTF-8": (rest.call("POST", path, b"token=%ff%fe", headers=FORM).status, 400),
        "bytes": (rest.call("POST", path, bytes(range(256)), headers=FORM).status, 400),
        "another method": (rest.call("PUT", path, body, headers=FORM).status, 405),
        "a slash behind": (rest.get(f"{path}/?token={NONSENSE}").status, 404),
        "no token in the link": (rest.get(path).status, 200 if path == f"/{RESET}" else 400),
        "an empty token in the link": (rest.get(f"{path}?token=").status, 400),
    }
    assert {name: status for name, (status, _) in statuses.items()} == {
        name: wanted for name, (_, wanted) in statuses.items()
    }


@pytest.mark.parametrize("kind", [VERIFY, RESET, CHANGE])
def test_looking_at_the_head_of_a_page_is_like_looking_at_it(site, mailbox, kind):
    link = urlsplit(someone_with(site, mailbox, kind).link)
    rest = Rest(site)
    looked, shown = (rest.call(method, f"{link.path}?{link.query}") for method in ("HEAD", "GET"))
    assert (looked.status, looked.body, shown.status) == (200, b"", 200)
    assert set(looked.headers) - {"content-length"} == set(shown.headers) - {"content-length"}


def test_a_page_says_nothing_of_whose_link_it_is_before_it_is_pressed(site, mailbox, desktop):
    for kind in (VERIFY, RESET, CHANGE):
        someone = someone_with(site, mailbox, kind)
        desktop.open(someone.link)
        for told in (someone.person.email, someone.person.username, someone.new_email):
            assert not told or told not in desktop.html(), "opening a link reveals nothing about its owner"
