"""A `parleyd serve` process for benchmarks: started on a free port, waited for, ended."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from parley_client import Client

_READY_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Server:
    """A ready server. `pid` is the gateway's."""

    target: str
    pid: int


@contextmanager
def serving(arguments: Sequence[str] = ()) -> Iterator[Server]:
    """Serves for the body of the `with`; `arguments` are those of `parleyd serve`."""
    command = [sys.executable, "-m", "parleyd", "serve", "--port", "0", "--drain-delay", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("listening on "):
            raise RuntimeError("parleyd did not start; its log tells why")
        target = line.removeprefix("listening on ").strip()
        with Client(target) as client:
            client.wait_until_ready(timeout=_READY_TIMEOUT_S)
        yield Server(target, process.pid)
    finally:
        process.terminate()
        process.wait(60)
