"""Pages in a real browser: Chromium without a window, on a server of this process."""

from __future__ import annotations

import functools
import http.server
import json
import pathlib
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-extensions", "--enable-logging=stderr", "--virtual-time-budget=4000"),
    # Nothing but the server of the test has an address.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
_LOOK = """<!DOCTYPE html><meta charset="utf-8"><link rel="icon" href="data:,"><body>
<iframe id="page" style="border: 0; width: WIDTHpx; height: 800px"></iframe><pre id="found"></pre>
<script>
const page = document.getElementById("page"), found = {};
page.onload = () => {
  const own = page.contentDocument;
  for (const each of own.querySelectorAll("details")) each.open = true;
  found.width = own.documentElement.clientWidth;
  found.scroll = own.documentElement.scrollWidth;
  found.resources = page.contentWindow.performance.getEntriesByType("resource").map(e => e.name);
  found.text = own.body.innerText;
  found.pictures = [...own.querySelectorAll("figure svg")].map(e => {
    const box = e.getBoundingClientRect();
    return [box.width, box.height];
  });
  found.scripts = own.scripts.length + own.querySelectorAll("[onerror], img, script").length;
  document.getElementById("found").textContent = encodeURIComponent(JSON.stringify(found));
};
page.src = "PAGE";
</script></body>"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    asked: list[str]

    def log_message(self, *_: Any) -> None:
        self.asked.append(self.path)


class Browser:
    """Chromium, which opens pages of a folder.

    :param program: Path of the program.
    :param folder: Folder of the profile and of what is looked at.
    """

    def __init__(self, program: str, folder: pathlib.Path) -> None:
        self.program, self.folder = program, folder
        self.asked: list[str] = []
        handler = type("Handler", (_Quiet,), {"asked": self.asked})
        self._server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(handler, directory=str(folder))
        )
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def look(self, page: str, width: int) -> dict[str, Any]:
        """Return what a page has and needs in a frame of a width, with all folded parts open.

        :param page: Name of a file of the folder.
        """
        frame = _LOOK.replace("WIDTH", str(width)).replace("PAGE", page)
        (self.folder / "look.html").write_text(frame, "utf-8")
        self.asked.clear()
        done = self._run("--dump-dom", f"{self.address}/look.html")
        (text,) = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
        assert text, done.stderr[-2000:]
        from urllib.parse import unquote

        found: dict[str, Any] = json.loads(unquote(text))
        found["console"] = re.findall(r"CONSOLE.*", done.stderr)
        found["asked"] = list(self.asked)
        return found

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        profile = f"--user-data-dir={self.folder / 'profile'}"
        return subprocess.run(
            [self.program, *_OPTIONS, profile, *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )

    def close(self) -> None:
        """End the server."""
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def browser(tmp_path: pathlib.Path) -> Iterator[Browser]:
    """Return a browser on the folder ``tmp_path``; tests that need it are skipped without one."""
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(_NAMES)} is installed: pages are opened in a browser")
    found = Browser(program, tmp_path)
    yield found
    found.close()
