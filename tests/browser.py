"""A real Chromium, driven by the DevTools protocol over a pipe: no library, no port.

https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from stores import Missing

Json = dict[str, Any]

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_WAIT_S = 60.0


def program() -> str:
    """Raises :class:`Missing`."""
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        raise Missing("no Chromium on this machine: apt-get install chromium")
    return found


class Browser:
    """One page. ``problems`` are exceptions and refusals of its scripts, ``addresses`` everything that it loaded."""

    def __init__(self, profile: Path) -> None:
        (to_read, self._to), (self._from, to_write) = os.pipe(), os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += [f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        # Chromium reads descriptor 3 and writes 4.
        command = ["bash", "-c", f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}', program(), *options]
        self._process = subprocess.Popen(command, pass_fds=(to_read, to_write), stderr=subprocess.DEVNULL)
        os.close(to_read)
        os.close(to_write)
        self._ids = itertools.count(1)
        self._rest = b""
        self._session: str | None = None
        self.problems: list[str] = []
        self.addresses: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Json:
        id = next(self._ids)
        message: Json = {"id": id, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == id:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _next(self) -> Json:
        while b"\0" not in self._rest:
            part = os.read(self._from, 1 << 20)
            assert part, "the browser has ended"
            self._rest += part
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: Json) -> None:
        match event.get("method"), event.get("params"):
            case "Runtime.exceptionThrown", {"exceptionDetails": details}:
                self.problems.append(json.dumps(details)[:2000])
            case "Log.entryAdded", {"entry": {"level": "error", "source": source, "text": text}} if source != "network":
                self.problems.append(f"{source}: {text}")
            case "Network.requestWillBeSent", {"request": {"url": url}}:
                self.addresses.append(url)
            case _:
                pass

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def size(self, width: int, height: int, *, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def value(self, script: str) -> Any:
        """Of an expression, or of what it promises."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, f"{script}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def until(self, script: str) -> Any:
        """The value of an expression, once it is a true one."""
        give_up = time.monotonic() + _WAIT_S
        # A node has no value of its own.
        asked = f"(found => found instanceof Node || found)({script})"
        while not (found := self.value(asked)):
            assert time.monotonic() < give_up, f"{script}\n{self.problems}\n{self.text()}"
            time.sleep(0.05)
        return found

    def text(self) -> str:
        return self.value("document.body.innerText")

    def shows(self, text: str) -> None:
        self.until(f"document.body.innerText.includes({json.dumps(text)})")

    def click(self, selector: str, text: str = "") -> None:
        """What a selector finds that has this text."""
        self.until(
            f"(found => found && (found.click(), true))([...document.querySelectorAll({json.dumps(selector)})]"
            f".find(one => one.innerText.includes({json.dumps(text)}) && !one.disabled))"
        )

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int = 0) -> None:
        for kind in ("keyDown", "keyUp"):
            text = "\r" if key == "Enter" and kind == "keyDown" else ""
            more = {"windowsVirtualKeyCode": code, "text": text}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, **more)

    def picture(self, file: Path) -> None:
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        os.close(self._to)
        os.close(self._from)
