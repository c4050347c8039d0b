"""Both sides of a WorkerClient: a worker that does as it is told, and readers that take their answers to the end."""

from __future__ import annotations

import asyncio

from parleyd.errors import EngineFault
from parleyd.gateway.worker_client import WorkerClient
from parleyd.generation import EngineRequest, EngineStats, FinishReason, Output, SamplingParams
from parleyd.telemetry.call import Call, current_call
from parleyd.telemetry.metrics import Load, Metrics

_PARAMS = SamplingParams(max_new_tokens=100)


class Worker:
    """The other end of a link: what it was told to do. Its ids tell their positions, so that none is lost unseen."""

    def __init__(self) -> None:
        self.open: dict[int, int] = {}  # key: ids made so far, by any worker
        self.num_made: dict[int, int] = {}

    def submit(self, request: EngineRequest) -> None:
        assert request.key not in self.open
        self.open[request.key], self.num_made[request.key] = len(request.output_ids), 0
        assert request.output_ids == tuple(range(len(request.output_ids)))

    def abort(self, key: int) -> None:
        self.open.pop(key, None)

    def make(self, key: int, *, last: bool) -> Output:
        position = self.open[key]
        self.open[key] += 1
        self.num_made[key] += 1
        if last:
            del self.open[key]
        return Output(key=key, token_ids=(position,), finish_reason=FinishReason.STOP if last else None)


class Reader:
    """Takes an answer to its end."""

    def __init__(self, client: WorkerClient) -> None:
        self.key = client.next_key()
        self.ids: list[int] = []
        self.num_ends = 0
        self.error: Exception | None = None
        self._client = client
        self.task = asyncio.get_event_loop().create_task(self._read())

    async def _read(self) -> None:
        current_call.set(Call("Generate", f"request-{self.key}"))
        request = EngineRequest(key=self.key, prompt_ids=(1,), params=_PARAMS)
        try:
            async for delta in self._client.generate(request, self._end):
                self.ids += delta.token_ids
        except EngineFault as error:
            self.error = error

    def _end(self) -> None:
        self.num_ends += 1


def _no_load() -> Load:
    return Load(
        model="", num_open_calls=0, num_waiting=0, num_running=0, max_running=1, is_serving=True,
        num_worker_restarts=0, num_handed_over=0, engine=EngineStats(),
    )  # fmt: skip


METRICS = Metrics(_no_load)
