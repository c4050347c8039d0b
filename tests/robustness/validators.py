"""What must be true once traffic and faults are over."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from pathlib import Path

import psutil

from tests.support.eventually import eventually
from tests.support.gateway import GatewayThread

# A health watch that was cancelled, or a spare worker that has just begun to load.
_REST_S = 0.5
# Caches fill, such as the tokenizer's of words, and malloc keeps what it has had. What leaks with each request or fault
# is more.
_MAX_GROWTH_BYTES = 64 * 2**20


class Belongings:
    """What this process holds: threads, file descriptors, child processes and memory."""

    def __init__(self) -> None:
        self.num_threads = threading.active_count()
        self.num_files = len(os.listdir("/proc/self/fd"))
        self.num_children = len(psutil.Process().children(recursive=True))
        self.memory_bytes = psutil.Process().memory_info().rss

    def __repr__(self) -> str:
        what = f"{self.num_threads} threads, {self.num_files} files, {self.num_children} processes"
        return f"{what}, {self.memory_bytes / 2**20:.0f} MiB"

    def covers(self, later: Belongings) -> bool:
        """Whether nothing has been added; gRPC keeps a few descriptors of its own."""
        return (
            later.num_threads <= self.num_threads + 2
            and later.num_files <= self.num_files + 4
            and later.num_children <= self.num_children
            and later.memory_bytes <= self.memory_bytes + _MAX_GROWTH_BYTES
        )


def tasks_at_rest(gateway: GatewayThread) -> Counter[str]:
    """What the gateway's event loop holds all the time, call or no call."""
    tasks = gateway.tasks()
    deadline = time.monotonic() + _REST_S
    while time.monotonic() < deadline:
        time.sleep(0.05)
        tasks &= gateway.tasks()
    return tasks


def assert_idle(gateway: GatewayThread, at_rest: Counter[str]) -> None:
    """No call, slot, queue place, request or KV block is left, in the gateway or the engine; and no task."""
    gateway.wait_idle()
    inner = gateway.gateway
    assert (inner.admission.num_running, inner.admission.num_waiting) == (0, 0)
    eventually(lambda: inner.load().engine.num_running == 0, "the engine still runs something")
    eventually(lambda: inner.load().engine.num_used_blocks == 0, "a KV block belongs to nobody")
    assert_no_tasks_left(gateway, at_rest)


def assert_no_tasks_left(gateway: GatewayThread, at_rest: Counter[str], timeout_s: float = 10.0) -> None:
    """The gateway's event loop holds no more tasks than `tasks_at_rest` found."""
    eventually(
        lambda: gateway.tasks() <= at_rest, lambda: f"tasks are left: {dict(gateway.tasks() - at_rest)}", timeout_s
    )


def assert_no_leaks(before: Belongings) -> None:
    """All that was opened since has been closed."""
    eventually(lambda: before.covers(Belongings()), lambda: f"from {before} to {Belongings()}")


def assert_no_orphans(marker: Path) -> None:
    """No worker outlives its gateway; `marker` is in the command line of those started here."""

    def orphans() -> list[int]:
        return [p.pid for p in psutil.process_iter(["cmdline"]) if str(marker) in (p.info["cmdline"] or [])]

    eventually(lambda: not orphans(), "a worker has no gateway any more")
