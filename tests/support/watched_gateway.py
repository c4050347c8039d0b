"""The gateway as a process of its own, whose event loop notes how much CPU time each callback takes.

CPU time and not the clock's: what other processes of a busy machine take is no fault of the gateway's. `SIGUSR1` starts
the count anew; after SIGTERM one line on stdout is JSON, the callbacks that took most: [[milliseconds, what], …].
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import signal
import subprocess
import sys
import time
from asyncio.events import Handle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parley_client import Client
from parleyd.gateway.server import serve
from tests.support.gateway import scripted_command, scripted_settings

_NUM_KEPT = 10
_TIMEOUT_S = 30.0
_SETTLE_S = 0.2  # the callback that made it ready collects garbage, and may end after a client knows


class WatchedGateway:
    """The process. `worst` ends it and tells the callbacks since `reset`."""

    def __init__(self, process: subprocess.Popen[str], target: str) -> None:
        self._process = process
        self.pid = process.pid
        self.target = target

    def reset(self) -> None:
        time.sleep(_SETTLE_S)
        self._process.send_signal(signal.SIGUSR1)

    def worst(self) -> list[tuple[float, str]]:
        self._process.send_signal(signal.SIGTERM)
        output, _ = self._process.communicate(timeout=_TIMEOUT_S)
        return [(float(milliseconds), str(what)) for milliseconds, what in json.loads(output.splitlines()[-1])]


@contextmanager
def watched_gateway(
    folder: Path, *, max_running: int, max_queue: int = 0, step_delay_s: float = 0.0
) -> Iterator[WatchedGateway]:
    """Ready to serve, with a scripted worker and the tokenizer in `folder`."""
    options = {"folder": folder, "max-running": max_running, "max-queue": max_queue, "step-delay": step_delay_s}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "tests.support.watched_gateway", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        target = process.stdout.readline().removeprefix("listening on ").strip()
        with Client(target) as client:
            client.wait_until_ready(_TIMEOUT_S)
        yield WatchedGateway(process, target)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class _Watch:
    """Times every callback of every asyncio loop of this process."""

    def __init__(self) -> None:
        self._worst: list[tuple[float, str]] = []
        run = Handle._run  # type: ignore[attr-defined]

        def timed(handle: Any) -> None:
            started = time.thread_time()
            run(handle)
            self._note(1000 * (time.thread_time() - started), handle)

        Handle._run = timed  # type: ignore[attr-defined]

    def reset(self, *_: object) -> None:
        self._worst = []

    def worst(self) -> list[tuple[float, str]]:
        return sorted(self._worst, reverse=True)

    def _note(self, milliseconds: float, handle: Any) -> None:
        if len(self._worst) < _NUM_KEPT:
            heapq.heappush(self._worst, (milliseconds, repr(handle)))
        elif milliseconds > self._worst[0][0]:
            heapq.heapreplace(self._worst, (milliseconds, repr(handle)))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--max-running", type=int, required=True)
    parser.add_argument("--max-queue", type=int, required=True)
    parser.add_argument("--step-delay", required=True)
    arguments = parser.parse_args()
    settings = scripted_settings(
        max_running=arguments.max_running,
        max_queue=arguments.max_queue,
        tool_format="hermes",
        reasoning_format="think",
        log_level="warning",
        drain_timeout=0.0,
    )
    watch = _Watch()
    signal.signal(signal.SIGUSR1, watch.reset)
    limits = ("--max-running", str(arguments.max_running), "--step-delay", arguments.step_delay)
    command = scripted_command(arguments.folder, *limits)
    asyncio.run(serve(settings, lambda line: print(line, flush=True), command))
    print(json.dumps(watch.worst()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
