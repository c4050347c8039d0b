"""A whole replica as a process of its own, with a scripted worker: what `parleyd serve` is to the real model."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from parleyd.config import Settings
from parleyd.gateway.server import serve
from tests.support.gateway import scripted_command, scripted_settings
from tests.support.tasks import other_tasks
from tests.support.wall_clock import jumping_clock


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--drain-delay", type=float, default=0.3)
    parser.add_argument("--drain-timeout", type=float, default=30.0)
    parser.add_argument("--step-delay", default="0.002")
    parser.add_argument("--hold-if", help="a file: workers load nothing for as long as it is there")
    parser.add_argument("--clock-jumps", action="store_true", help="time.time is a day off, now and then")
    arguments = parser.parse_args()
    settings = scripted_settings(
        port=arguments.port,
        max_running=16,
        max_queue=200,
        drain_delay=arguments.drain_delay,
        drain_timeout=arguments.drain_timeout,
    )
    worker = ("--max-running", "16", "--step-delay", arguments.step_delay)
    hold = ("--hold-if", arguments.hold_if) if arguments.hold_if else ()
    command = scripted_command(arguments.folder, *worker, *hold)
    with jumping_clock() if arguments.clock_jumps else nullcontext():
        asyncio.run(_serve(settings, command))


async def _serve(settings: Settings, command: Sequence[str]) -> None:
    """The process fails if any task outlives the gateway."""
    await serve(settings, announce=lambda line: print(line, flush=True), worker_command=command)
    left = await other_tasks()
    assert not left, f"tasks outlived the gateway: {dict(left)}"


if __name__ == "__main__":
    main()
