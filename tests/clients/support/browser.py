"""A real browser (Debian's Chromium), driven over the DevTools protocol through a pipe, without a driver or a port.

A `Page` is used as a person uses one: open, look, click, type, press keys. Scripts are off unless a test turns them
on. What the browser complains about (console, Content-Security-Policy) is kept.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from support.wait import wait_until

DEADLINE = 30
# CSS pixels.
PHONE, DESKTOP = (390, 844), (1280, 800)
NO_USERNAME = "Password forms should have (optionally hidden) username fields"
KEYS = {"Tab": (9, None), "Enter": (13, "\r")}
# The roles of elements that users of a keyboard or a screen reader can operate.
INTERACTIVE = {"button", "link", "textbox", "checkbox", "radio", "combobox"}


def find_chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@dataclass(frozen=True)
class Node:
    """A node of the accessibility tree."""

    role: str
    name: str
    properties: dict[str, object]


class Browser:
    """One headless Chromium with its own profile. It is closed over the pipe, or killed by its process id."""

    def __init__(self, executable: str, directory: Path):
        self._directory = directory
        self._next = 0
        self._unread = b""
        self.events: list[dict] = []
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        # Chromium uses descriptors 3 and 4. These copies have higher numbers, so that they do not conflict.
        far = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (to_browser, from_browser)]
        command = [executable, "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={directory / 'profile'}"]
        command += ["--no-first-run", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--lang=en"]
        # Chromium must make no requests of its own.
        command += [
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-proxy-server",
        ]
        if os.geteuid() == 0:
            command += ["--no-sandbox"]
        with (directory / "chromium.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", f'exec "$@" 3<&{far[0]} 4>&{far[1]}', "bash", *command],
                pass_fds=far,
                cwd=directory,
                env={**os.environ, "HOME": str(directory)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        for fd in (to_browser, from_browser, *far):
            os.close(fd)

    def close(self) -> None:
        try:
            self.send("Browser.close")
            self._process.wait(10)
        except (AssertionError, OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        finally:
            os.close(self._in)
            os.close(self._out)

    def page(self, size: tuple[int, int] = DESKTOP, dark: bool = False, scripts: bool = False) -> "Page":
        """A page in its own context: it shares no cookies and no cache with other pages."""
        context = self.send("Target.createBrowserContext")["browserContextId"]
        target = self.send("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return Page(self, session, context, size, dark, scripts)

    def send(self, method: str, session: str | None = None, **parameters) -> dict:
        self._next += 1
        message = {"id": self._next, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + DEADLINE
        while True:
            heard = self._read(end)
            if heard.get("id") == self._next:
                assert "error" not in heard, f"{method}: {heard['error']}"
                return heard["result"]
            self.events.append(heard)

    def listen(self, seconds: float) -> None:
        """Reads the events of the browser for this number of seconds."""
        end = time.monotonic() + seconds
        while select.select([self._in], [], [], max(0, end - time.monotonic()))[0]:
            self.events.append(self._read(end + DEADLINE))

    def _read(self, end: float) -> dict:
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._in], [], [], max(0, end - time.monotonic()))
            assert ready, f"Chromium says nothing; its log ends: {self._log()}"
            part = os.read(self._in, 1 << 20)
            assert part, f"Chromium ended; its log ends: {self._log()}"
            self._unread += part
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    def _log(self) -> str:
        return (self._directory / "chromium.log").read_text(errors="replace")[-2000:]


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str, context: str, size: tuple[int, int], dark: bool, scripts: bool):
        self._browser = browser
        self._session = session
        self._context = context
        self.size = size
        for domain in ("Page", "Runtime", "Log", "Network", "Audits", "DOM", "Accessibility"):
            self._send(f"{domain}.enable")
        self._send("Page.setLifecycleEventsEnabled", enabled=True)
        self._send("Emulation.setScriptExecutionDisabled", value=not scripts)
        width, height = size
        phone = size == PHONE
        self._send(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._send("Emulation.setEmulatedMedia", features=[scheme])

    def close(self) -> None:
        self._browser.send("Target.disposeBrowserContext", browserContextId=self._context)

    # -- what a person does ---------------------------------------------------------------------------------------

    def open(self, url: str) -> "Page":
        begun = len(self._browser.events)
        failed = self._send("Page.navigate", url=url).get("errorText")
        assert not failed, f"{url}: {failed}"
        self._wait_for_load(begun)
        return self

    def click(self, selector: str) -> None:
        """Clicks the middle of an element, and waits until the page that this opens is loaded."""
        begun = len(self._browser.events)
        node = self._node(selector)
        self._send("DOM.scrollIntoViewIfNeeded", nodeId=node)
        corners = self._send("DOM.getBoxModel", nodeId=node)["model"]["border"]
        x, y = sum(corners[0::2]) / 4, sum(corners[1::2]) / 4
        for kind in ("mousePressed", "mouseReleased"):
            self._send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self._wait_for_load(begun)

    def fill(self, selector: str, text: str) -> None:
        self._send("DOM.focus", nodeId=self._node(selector))
        self.type(text)

    def type(self, text: str) -> None:
        """Types into the element that has the focus."""
        self._send("Input.insertText", text=text)

    def press(self, key: str, leads_on: bool = False) -> None:
        """Presses a key. If it `leads_on` to another page, waits until that page is loaded."""
        begun = len(self._browser.events)
        code, text = KEYS[key]
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code, **({"text": text} if text else {})}
        self._send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **event)
        self._send("Input.dispatchKeyEvent", type="keyUp", **{**event, **({"text": ""} if text else {})})
        if leads_on:
            self._wait_for_load(begun)

    # -- what a person sees ---------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return self._send("Page.getNavigationHistory")["entries"][-1]["url"]

    @property
    def text(self) -> str:
        """The visible text of the page."""
        return self.evaluate("document.body.innerText")

    def html(self) -> str:
        root = self._send("DOM.getDocument")["root"]["nodeId"]
        return self._send("DOM.getOuterHTML", nodeId=root)["outerHTML"]

    def evaluate(self, expression: str):
        """Evaluates an expression through DevTools, which works although the page's own scripts are off."""
        answer = self._send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def accessibility(self) -> list[Node]:
        """The accessibility tree, without the nodes that assistive technology ignores."""
        nodes = self._send("Accessibility.getFullAXTree")["nodes"]
        return [
            Node(
                node["role"]["value"],
                node.get("name", {}).get("value", ""),
                {each["name"]: each["value"].get("value") for each in node.get("properties", [])},
            )
            for node in nodes
            if not node["ignored"]
        ]

    def focused(self) -> Node | None:
        found = [node for node in self.accessibility() if node.properties.get("focused") and node.role in INTERACTIVE]
        return found[0] if found else None

    def document(self) -> dict:
        """The response of the current page: `status`, and `headers` by lower-case name."""
        newest = self._documents()[-1]
        return {**newest, "headers": {name.lower(): value for name, value in newest["headers"].items()}}

    def _documents(self) -> list[dict]:
        received = (event["params"] for event in self._events("Network.responseReceived"))
        return [each["response"] for each in received if each["type"] == "Document"]

    def complaints(self) -> list[str]:
        """What the browser complained about: errors, violated policies, and everything in the console.

        Two complaints are ignored. Chromium logs an error if the status of a document is 400, which is expected. It
        also wants a username field in password forms, which ours must not have because it would reveal the account.
        """
        self._browser.listen(0.2)
        found = []
        documents = {response["url"] for response in self._documents()}
        for event in self._events("Log.entryAdded"):
            entry = event["params"]["entry"]
            is_status = entry["source"] == "network" and entry.get("url") in documents
            if not is_status and NO_USERNAME not in entry["text"]:
                found.append(f"{entry['level']}: {entry['text']} ({entry.get('url')})")
        for event in self._events("Runtime.consoleAPICalled") + self._events("Runtime.exceptionThrown"):
            found.append(json.dumps(event["params"]))
        for event in self._events("Audits.issueAdded"):
            found.append(json.dumps(event["params"]["issue"]))
        return found

    def requests(self) -> list[str]:
        """Every URL that was requested."""
        return [event["params"]["request"]["url"] for event in self._events("Network.requestWillBeSent")]

    def screenshot(self, file: Path) -> None:
        image = self._send("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(image))

    # -- below ----------------------------------------------------------------------------------------------------

    def _send(self, method: str, **parameters) -> dict:
        return self._browser.send(method, self._session, **parameters)

    def _events(self, method: str) -> list[dict]:
        return [e for e in self._browser.events if e.get("sessionId") == self._session and e.get("method") == method]

    def _node(self, selector: str) -> int:
        root = self._send("DOM.getDocument")["root"]["nodeId"]
        node = self._send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        assert node, f"there is no {selector} in {self.html()[:3000]}"
        return node

    def _wait_for_load(self, begun: int) -> None:
        """Waits until the first document that was opened after event number `begun` is loaded completely."""

        def loaded() -> bool:
            self._browser.listen(0.01)
            since = [event for event in self._browser.events[begun:] if event.get("sessionId") == self._session]
            loaders = [
                event["params"]["frame"]["loaderId"] for event in since if event["method"] == "Page.frameNavigated"
            ]
            finished = [
                event["params"]["loaderId"]
                for event in since
                if event["method"] == "Page.lifecycleEvent" and event["params"]["name"] == "load"
            ]
            return bool(loaders) and loaders[0] in finished

        wait_until("the page is loaded", loaded, DEADLINE, pause=0.01)
