"""A headless Chromium, driven over its debugging protocol; what it says on its console is kept."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

__all__ = ["Chromium", "find"]

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
START_S = 60.0
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
    "--disable-dev-shm-usage", "--disable-background-networking", "--remote-debugging-port=0",
    "--disable-component-update", "--disable-extensions", "--mute-audio",
)  # fmt: skip


def find() -> str | None:
    """The browser of this machine."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Chromium:
    """One page. `troubles` are errors of the console, exceptions, and requests that failed.

    Args:
        folder: for its profile.
    """

    def __init__(self, folder: Path) -> None:
        path = find()
        assert path is not None
        self._process = subprocess.Popen(
            [path, *FLAGS, f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        prefix = "DevTools listening on "
        told = next((line for line in self._process.stderr if line.startswith(prefix)), "")
        assert told, "the browser did not start"
        self._ids = itertools.count(1)
        self.troubles: list[str] = []
        self.requested: list[str] = []
        self._open = ExitStack()
        self._socket = self._open.enter_context(
            connect(told.removeprefix(prefix).strip(), max_size=None)
        )
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        """Ends it."""
        self._open.close()
        self._process.terminate()
        self._process.wait(10)
        assert self._process.stderr is not None
        self._process.stderr.close()

    def call(self, method: str, **parameters: Any) -> Any:
        """What the protocol answers."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            told = json.loads(self._socket.recv(START_S))
            if told.get("id") == number:
                assert "error" not in told, (method, told["error"])
                return told["result"]
            self._note(told)

    def _note(self, told: dict[str, Any]) -> None:
        method, parameters = told.get("method"), told.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.troubles.append(json.dumps(parameters["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):
            self.troubles.append(json.dumps(parameters["args"])[:500])
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.troubles.append(parameters["entry"]["text"] + parameters["entry"].get("url", ""))
        elif method == "Network.requestWillBeSent":
            self.requested.append(parameters["request"]["url"])

    def open(self, url: str) -> None:
        """Goes there."""
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        told = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def until(self, condition: str, within_s: float = 30.0) -> Any:
        """The condition's value once it holds; it is looked at again whenever the page draws."""
        end_s = time.monotonic() + within_s
        while time.monotonic() < end_s:
            value = self.run(
                "new Promise((done) => setTimeout("
                f"() => done((() => {{ return {condition}; }})()), 50))"
            )
            if value:
                return value
        raise AssertionError(f"it never held: {condition}; {self.troubles}")

    def key(self, name: str) -> None:
        """Presses a key."""
        more = {"text": "\r"} if name == "Enter" else {}
        codes = {
            "Enter": 13,
            "Tab": 9,
            "Backspace": 8,
            "ArrowDown": 40,
            "ArrowRight": 39,
            "ArrowUp": 38,
            "ArrowLeft": 37,
        }
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=name, code=name,
                windowsVirtualKeyCode=codes[name], **(more if kind == "keyDown" else {}),
            )  # fmt: skip

    def appear(self, *, width: int, height: int, dark: bool, still: bool = False) -> None:
        """The window's size, and what the system prefers."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
            mobile=False,
        )  # fmt: skip
        self.call(
            "Emulation.setEmulatedMedia",
            features=[
                {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
                {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"},
            ],
        )

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """A screenshot of the page."""
        told = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(told["data"]))
