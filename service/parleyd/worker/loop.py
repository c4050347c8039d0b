"""The generate thread's loop: step, hand over, again."""

from __future__ import annotations

from collections.abc import Callable

from parleyd.engine.engine import Engine
from parleyd.generation import Output


def run_loop(engine: Engine, send: Callable[[list[Output]], None]) -> None:
    """Runs for ever: one message a step, for all requests together. Raises what the engine cannot recover from."""
    while True:
        send(engine.step())
