"""clients/web: the page in a real browser, over gRPC-Web through a real Envoy, as the model answers."""

from __future__ import annotations

import http.server
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.envoy import Envoy
from tests.support.npm import CLIENTS, build, npm

WEB_CLIENT = CLIENTS / "web"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium"),
]


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="session")
def page() -> Iterator[str]:
    """The built page's address."""
    build(WEB_CLIENT)
    handler = partial(_QuietHandler, directory=str(WEB_CLIENT / "dist"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_page_streams_stops_and_tells_errors(page: str, envoy: Envoy, tmp_path: Path) -> None:
    answer = "streamed into a browser " * 12 + "<b>as text</b>"
    npm(
        WEB_CLIENT,
        "test",
        CHROMIUM=CHROMIUM or "",
        PAGE=page,
        SERVER=f"http://{envoy.target}",
        QUESTION=answer,
        ANSWER=answer,
        ENDLESS="!forever",
        HOME=str(tmp_path),
    )
