"""A headless Chromium that a test steers by its own protocol, so that it can log in."""

import json
import os
import shutil
import signal
import subprocess
import time
from base64 import b64decode
from urllib.request import Request, urlopen

from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """Opens pages in a tab of its own; `before` is a script that runs ahead of each page's."""

    def __init__(self, folder, before=""):
        self.folder, self.before, self.count, self.pictures = folder, before, 0, 0

    def __enter__(self):
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu"]
        command += ["--disable-dev-shm-usage", "--window-size=1500,1400"]
        command += [f"--user-data-dir={self.folder}", "--remote-debugging-port=0"]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, start_new_session=True, **silent)
        file = self.folder / "DevToolsActivePort"
        deadline = time.monotonic() + 120
        while not (file.exists() and len(file.read_text().split()) == 2):
            assert time.monotonic() < deadline, "chromium does not start"
            time.sleep(0.2)
        port = file.read_text().split()[0]
        wanted = Request(f"http://127.0.0.1:{port}/json/new?about:blank", method="PUT")
        with urlopen(wanted, timeout=60) as answer:
            page = json.loads(answer.read())
        self.socket = connect(page["webSocketDebuggerUrl"], max_size=None)
        self._ask("Page.enable")
        self._ask("Page.addScriptToEvaluateOnNewDocument", source=self.before)
        return self

    def __exit__(self, *_):
        self.socket.close()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def see(self, address, expected, seconds=120):
        """Opens a page, waits until its text holds all of `expected`, and leaves a picture of it.

        Pictures lie in `folder` as page-1.png and so on, in the order of the calls.
        """
        self._ask("Page.navigate", url=address)
        deadline = time.monotonic() + seconds
        while missing := [each for each in expected if each not in self._text()]:
            assert time.monotonic() < deadline, f"{address} lacks {missing}:\n{self._text()[:3000]}"
            time.sleep(1)
        self.pictures += 1
        picture = self._ask("Page.captureScreenshot")["data"]
        (self.folder / f"page-{self.pictures}.png").write_bytes(b64decode(picture))

    def _text(self):
        script = "document.body ? document.body.innerText : ''"
        return self._ask("Runtime.evaluate", expression=script)["result"].get("value", "")

    def _ask(self, method, **parameters):
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self.socket.recv(timeout=120))
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]
