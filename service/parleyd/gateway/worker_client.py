"""Requests to the worker and their outputs back: one streamer a request, found by the request's key."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Callable

from parleyd.errors import ParleyError
from parleyd.gateway.streamer import Delta, Streamer
from parleyd.gateway.worker_link import WorkerLink
from parleyd.generation import EngineRequest, Output
from parleyd.ipc.messages import Abort, Submit


class WorkerClient:
    """Generates through whichever worker is attached."""

    def __init__(self) -> None:
        self._keys = itertools.count()
        self._streamers: dict[int, Streamer] = {}

    @property
    def num_open(self) -> int:
        """Requests that a worker is generating for."""
        return len(self._streamers)

    async def generate(
        self, link: WorkerLink, request: EngineRequest, on_end: Callable[[], None] = lambda: None
    ) -> AsyncGenerator[Delta]:
        """Yields the answer's token ids as they come. Closing the generator early stops the worker within one token.

        `on_end` is called once the worker is done with the request, however much of it its reader has taken by then.
        Raises WorkerLost, EngineFault or whatever ended the request.
        """
        streamer = self._streamers[request.key] = Streamer(on_end)
        link.send(Submit(request))
        try:
            while True:
                # The seam for handing streams over to a fresh worker: where WorkerLost comes out of here, the request
                # and the ids already yielded are at hand to be submitted again.
                delta = await streamer.take()
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            # Forgotten by then if the worker ended it; else nobody waits for it any more.
            if self._streamers.pop(request.key, None) is not None:
                link.send(Abort(request.key))
                on_end()

    def next_key(self) -> int:
        """A key that no other request of this gateway has."""
        return next(self._keys)

    def dispatch(self, outputs: list[Output]) -> None:
        """Hands one step's outputs to their streamers; those of requests aborted meanwhile have none."""
        for output in outputs:
            streamer = self._streamers.pop(output.key, None) if output.is_last else self._streamers.get(output.key)
            if streamer is not None:
                streamer.put(output)

    def fail_all(self, error: ParleyError) -> None:
        """Ends every open request."""
        streamers, self._streamers = self._streamers, {}
        for streamer in streamers.values():
            streamer.fail(error)
