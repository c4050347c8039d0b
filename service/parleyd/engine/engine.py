"""What every engine offers the generate thread. An engine knows token ids only: no text, no gRPC."""

from __future__ import annotations

from typing import Protocol

from parleyd.generation import EngineRequest, EngineStats, Output


class Engine(Protocol):
    """Generates for the requests submitted to it.

    `submit` and `abort` may be called from another thread than `step`. At most `max_running` generate at once.
    """

    max_running: int

    @property
    def progress(self) -> int:
        """Changes whenever a piece of work is done, at least once for each request, though that be aborted by then; and
        never by what is asked for.

        Work that waits while it stands still means that the engine hangs, so a piece is as small as a layer: those of a
        long prompt may take minutes together. Read from another thread than the one that steps.
        """

    def submit(self, request: EngineRequest) -> None:
        """Takes a request into the queue."""

    def abort(self, key: int) -> None:
        """Stops generating for a request within one token. Unknown keys are ignored: it may just have ended."""

    def step(self) -> list[Output]:
        """What has been made since the last call, for all requests together; waits until there is something."""

    def stats(self) -> EngineStats:
        """How much there is to do, roughly where another thread asks than the one that steps."""
