"""The HTTP front of the peers that have none of their own: OpenAI's chat streaming, a thread a request.

Standard library only: it runs in a peer's environment.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Messages = list[dict[str, str]]


def serve(port: int, stream: Callable[[Messages, int], Generator[str]]) -> None:
    """Serves for ever. `stream` gives the pieces of an answer of exactly so many tokens, a token a piece; it is closed
    early where the client goes."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            with closing(stream(body["messages"], body["max_tokens"])) as pieces, suppress(ConnectionError):
                for num_tokens, piece in enumerate(pieces, start=1):
                    usage = {"completion_tokens": num_tokens}
                    self._event({"choices": [{"delta": {"content": piece}}], "usage": usage})
                self.wfile.write(b"data: [DONE]\n\n")

        def _event(self, chunk: dict[str, Any]) -> None:
            self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")

        def log_message(self, format: str, *args: Any) -> None:
            """Not a line a request."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 1024

    Server(("127.0.0.1", port), Handler).serve_forever()
