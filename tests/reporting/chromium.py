"""A headless chromium over its debugging pipe: JSON messages ended by a zero byte on file descriptors 3 and 4. Needs no library."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOW = "install one with: apt-get install -y --no-install-recommends chromium"
INSTALL_SECONDS = 300.0
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-extensions", "--disable-dev-shm-usage", "--hide-scrollbars", "--window-size=1400,900")
# The browser wants the pipes at 3 and 4, whatever numbers they have here.
STARTER = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "ArrowUp": 38, "ArrowDown": 40, "Home": 36, "End": 35, "Escape": 27, "Tab": 9, "Enter": 13}


class BrowserError(RuntimeError):
    """The browser ended, did not answer in time, or a script in the page threw."""


def find_chromium() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def install_chromium() -> str:
    """Debian's, where there is none. Raises BrowserError with the reason where that cannot be."""
    found = find_chromium()
    if found:
        return found
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise BrowserError(f"no chromium, and only root with apt-get can install it; {HOW}")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, env=quiet)
        except subprocess.TimeoutExpired as error:
            raise BrowserError(f"{' '.join(command)} took longer than {INSTALL_SECONDS:.0f} s; {HOW}") from error
        if done.returncode != 0:
            raise BrowserError(f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}; {HOW}")
    found = find_chromium()
    if not found:
        raise BrowserError(f"apt-get installed no chromium; {HOW}")
    return found


class Browser:
    """One process; every page is a tab of its own. A context manager: leaving it ends the process."""

    def __init__(self, program: str) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="chromium-")
        theirs_in, self.ours_out = os.pipe()
        self.ours_in, theirs_out = os.pipe()
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]
        command = [sys.executable, "-c", STARTER, *map(str, high), program, *FLAGS, f"--user-data-dir={self.folder.name}", "about:blank"]
        self.process = subprocess.Popen(command, pass_fds=high, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                        env={**os.environ, "HOME": self.folder.name})
        for end in (theirs_in, theirs_out, *high):
            os.close(end)
        self.buffer, self.number, self.events = b"", 0, []

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.call("Browser.close", timeout=5)
            self.process.wait(5)
        except (BrowserError, OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait(10)
        os.close(self.ours_in)
        os.close(self.ours_out)
        for _ in range(50):  # its helpers may still be writing there for a moment
            try:
                self.folder.cleanup()
                break
            except OSError:
                time.sleep(0.1)

    def call(self, method: str, session: str | None = None, timeout: float = 60.0, **parameters: Any) -> dict[str, Any]:
        """The result of a command; events that come before it are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.ours_out, data):]
        deadline = time.monotonic() + timeout
        while True:
            answer = self._message(deadline, method)
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def _message(self, deadline: float, what: str) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.ours_in], [], [], left)[0]:
                raise BrowserError(f"chromium did not answer {what} in time")
            data = os.read(self.ours_in, 1 << 20)
            if not data:
                raise BrowserError(f"chromium ended (code {self.process.poll()}) before it answered {what}")
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, page: Path, fragment: str = "", dark: bool = False) -> Page:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        opened = Page(self, session, target)
        for domain in ("Page", "Runtime", "Network", "Log"):
            opened.call(f"{domain}.enable")
        opened.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        opened.call("Page.navigate", url=page.resolve().as_uri() + fragment)
        return opened


class Page:
    """A tab."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self.browser, self.session, self.target = browser, session, target

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def evaluate(self, script: str) -> Any:
        """The value of an expression, waited for where it is a promise. Raises BrowserError with what it threw."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise BrowserError(f"{script}: {done['exceptionDetails'].get('exception', {}).get('description', done['exceptionDetails']['text'])}")
        return done["result"].get("value")

    def wait(self, script: str, seconds: float = 20.0) -> Any:
        """The expression's value as soon as it is true."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            value = self.evaluate(script)
            if value:
                return value
            time.sleep(0.02)
        raise BrowserError(f"{script} was not true within {seconds:.0f} s")

    def painted(self) -> float:
        """Milliseconds from the navigation's start until the page says that its first rollout is shown."""
        return float(self.wait("document.documentElement && document.documentElement.dataset.painted"))

    def press(self, key: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def pointer(self, x: float, y: float, kind: str = "mouseMoved") -> None:
        button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def point_at(self, selector: str) -> None:
        """Bring the pointer over an element's first box."""
        spot = self.evaluate(f"(() => {{ const node = document.querySelector({json.dumps(selector)}); node.scrollIntoView({{block: 'center'}});"
                             "const r = node.getClientRects()[0]; return [r.left + r.width / 2, r.top + r.height / 2]; })()")
        self.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        self.pointer(*spot)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _mine(self, chosen: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        self.evaluate("0")  # whatever was on its way is here now
        return [event for event in self.browser.events if event.get("sessionId") == self.session and chosen(event)]

    def requests(self) -> list[str]:
        """The addresses of everything that the page asked for, itself included."""
        return [event["params"]["request"]["url"] for event in self._mine(lambda event: event["method"] == "Network.requestWillBeSent")]

    def faults(self) -> list[str]:
        """Exceptions, console errors and warnings, refused requests and scripts."""
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled", "Page.javascriptDialogOpening")
        return [json.dumps(event["params"])[:500] for event in self._mine(lambda event: event["method"] in kinds)]

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)
