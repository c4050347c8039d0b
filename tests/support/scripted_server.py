"""A whole replica as a process of its own, with a scripted worker: what `parleyd serve` is to the real model."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from parleyd.gateway.server import serve
from tests.support.gateway import scripted_command, scripted_settings


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--drain-delay", type=float, default=0.3)
    parser.add_argument("--drain-timeout", type=float, default=30.0)
    parser.add_argument("--step-delay", default="0.002")
    arguments = parser.parse_args()
    settings = scripted_settings(
        port=arguments.port,
        max_running=16,
        max_queue=200,
        drain_delay=arguments.drain_delay,
        drain_timeout=arguments.drain_timeout,
    )
    command = scripted_command(arguments.folder, "--max-running", "16", "--step-delay", arguments.step_delay)
    asyncio.run(serve(settings, announce=lambda line: print(line, flush=True), worker_command=command))


if __name__ == "__main__":
    main()
