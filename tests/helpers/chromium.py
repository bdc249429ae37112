"""Headless Chromium, driven over the DevTools protocol through a pair of pipes: no port, no library."""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

DEADLINE = 600
"""Seconds after which a test gives up waiting: for a hung browser alone, not a bound of anything's speed."""
WASM_ONLY = ("--disable-gpu",)
SOFTWARE_WEBGPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")


def require_chromium() -> str:
    """Return the browser's path, or skip the test."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("chromium is not installed")
    return found


class Page:
    """A tab.

    Attributes:
        messages: What the page wrote to its console, exceptions included.
    """

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self.messages: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        return self._browser.send(method, parameters, self._session)

    def open(self, url: str, *, timeout: float = DEADLINE) -> None:
        """Open a page and wait until its modules ran."""
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'", timeout=timeout)

    def evaluate(self, expression: str, *, timeout: float = DEADLINE) -> Any:
        """Return the value of an expression, or of its promise.

        Raises:
            AssertionError: With the exception's text if it throws.
        """
        done = self._browser.send(
            "Runtime.evaluate",
            {"expression": expression, "awaitPromise": True, "returnByValue": True, "userGesture": True},
            self._session,
            timeout=timeout,
        )
        thrown = done.get("exceptionDetails")
        assert thrown is None, thrown.get("exception", {}).get("description") or thrown
        return done["result"].get("value")

    def wait(self, expression: str, *, timeout: float = DEADLINE) -> Any:
        """Wait until an expression is true; return its value."""
        end = monotonic() + timeout
        while not (value := self.evaluate(expression)):
            assert monotonic() < end, f"{expression} stayed false for {timeout} s; console: {self.messages}"
            sleep(0.05)
        return value

    def text(self, selector: str) -> str:
        """Return the visible text of an element."""
        return str(self.evaluate(f"document.querySelector({selector!r}).innerText"))

    def click(self, selector: str) -> None:
        """Click the middle of an element, as a mouse does."""
        x, y = self.evaluate(
            f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}});"
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, text: str = "") -> None:
        """Press and release a key."""
        codes = {"Tab": 9, "Enter": 13, " ": 32, "ArrowRight": 39}
        common = {"key": key, "windowsVirtualKeyCode": codes[key], "code": "Space" if key == " " else key}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the size of the window and the color scheme."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        """Write a picture of the whole page."""
        done = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(done["data"]))

    def receive(self, message: dict[str, Any]) -> None:
        """Note what the console shows."""
        parameters = message["params"]
        if message["method"] == "Runtime.consoleAPICalled":
            self.messages.append(" ".join(str(a.get("value", a.get("description"))) for a in parameters["args"]))
        elif message["method"] == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.messages.append(str(details.get("exception", {}).get("description", details["text"])))
        elif message["method"] == "Log.entryAdded":
            self.messages.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")


class Browser:
    """A running browser."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._ids = itertools.count(1)
        self._buffer = b""
        self._ready: deque[dict[str, Any]] = deque()
        self._pages: dict[str, Page] = {}

    def new_page(self, downloads: Path | None = None) -> Page:
        """Open a tab with storage of its own; what it downloads goes to a folder, or nowhere."""
        context = self.send("Target.createBrowserContext", {})["browserContextId"]
        allowed = {"behavior": "allow", "downloadPath": str(downloads)} if downloads else {"behavior": "deny"}
        self.send("Browser.setDownloadBehavior", {"browserContextId": context, **allowed})
        target = self.send("Target.createTarget", {"url": "about:blank", "browserContextId": context})["targetId"]
        session = self.send("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = self._pages[session] = Page(self, session)
        return page

    def send(
        self, method: str, parameters: dict[str, Any], session: str | None = None, *, timeout: float = DEADLINE
    ) -> dict[str, Any]:
        """Send a command and return its result.

        Raises:
            AssertionError: If the browser refuses it or does not answer.
        """
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        end = monotonic() + timeout
        while True:
            answer = self._receive(end, method)
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            page = self._pages.get(answer.get("sessionId", ""))
            if page is not None and "method" in answer:
                page.receive(answer)

    def _receive(self, end: float, waiting_for: str) -> dict[str, Any]:
        while not self._ready:
            readable, _, _ = select.select([self._from], [], [], max(0.0, end - monotonic()))
            assert readable, f"chromium did not answer {waiting_for}"
            read = os.read(self._from, 1 << 20)
            assert read, f"chromium ended during {waiting_for}"
            *whole, self._buffer = (self._buffer + read).split(b"\0")
            self._ready.extend(json.loads(each) for each in whole)
        return self._ready.popleft()


@contextmanager
def chromium(options: Sequence[str] = WASM_ONLY) -> Iterator[Browser]:
    """Run a headless browser with a profile of its own."""
    program = require_chromium()
    read_by_browser, to_browser = _pipe()
    from_browser, written_by_browser = _pipe()
    with tempfile.TemporaryDirectory(prefix="scm-chromium-", ignore_cleanup_errors=True) as profile:
        arguments = [
            program, "--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-proxy-server",
            "--hide-scrollbars", f"--user-data-dir={profile}", *options,
        ]  # fmt: skip
        # The protocol's pipes are file descriptors 3 and 4.
        actions = [
            (os.POSIX_SPAWN_DUP2, read_by_browser, 3),
            (os.POSIX_SPAWN_DUP2, written_by_browser, 4),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        ]
        pid = os.posix_spawn(program, arguments, os.environ | {"HOME": profile}, file_actions=actions, setpgroup=0)
        os.close(read_by_browser)
        os.close(written_by_browser)
        browser = Browser(to_browser, from_browser)
        try:
            yield browser
        finally:
            with suppress(AssertionError, OSError):
                browser.send("Browser.close", {}, timeout=5)
            os.close(to_browser)
            os.close(from_browser)
            _end(pid)


def _end(pid: int) -> None:
    """Wait for the browser; kill its process group where it stays."""
    end = monotonic() + 5
    while monotonic() < end:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return
        sleep(0.05)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _pipe() -> tuple[int, int]:
    """Return a pipe whose descriptors are above those that the browser's take."""
    ends = os.pipe()
    moved = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return moved[0], moved[1]
