"""A scheduler of few blocks and requests for it; a step without a model, in which all sample the same id."""

from __future__ import annotations

from dataclasses import dataclass

from parleyd.generation import EngineRequest, Output, SamplingParams
from parleyd.scheduling.kv_cache import KVLedger
from parleyd.scheduling.request import Batch
from parleyd.scheduling.scheduler import Scheduler

EOS, TOKEN = 2, 5
BLOCK_SIZE = 4


@dataclass(frozen=True, kw_only=True)
class Request(EngineRequest):
    priority: int = 0
    cache_salt: str = ""


def request(key: int, num_prompt: int = 3, *, priority: int = 0, salt: str = "", **params: object) -> Request:
    """A request whose prompt shares no token with another key's."""
    output = params.pop("output", ())
    prompt = params.pop("prompt", tuple(range(1000 * key, 1000 * key + num_prompt)))
    sampling = SamplingParams(**{"max_new_tokens": 20, **params})  # type: ignore[arg-type]
    return Request(key=key, prompt_ids=prompt, output_ids=output, params=sampling, priority=priority, cache_salt=salt)  # type: ignore[arg-type]


def scheduler(
    num_blocks: int = 50, *, running: int = 8, tokens: int = 16, context: int = 40, mixed: int | None = None
) -> Scheduler:
    return Scheduler(
        KVLedger(num_blocks, BLOCK_SIZE),
        max_running=running,
        max_batch_tokens=tokens,
        max_context_tokens=context,
        eos_token_ids=(EOS,),
        mixed_prefill_tokens=None if mixed is None else lambda *_: mixed,
    )


def entries(batch: Batch | None) -> list[tuple[int, int, int]]:
    """Key, start and number of tokens of each entry."""
    return [(s.sequence.key, s.start, s.num_tokens) for s in batch.scheduled] if batch else []


def step(engine: Scheduler, token_id: int = TOKEN) -> list[Output]:
    batch = engine.schedule()
    return engine.commit(batch, [token_id] * batch.num_samples) if batch else []


def keys(outputs: list[Output]) -> list[int]:
    return [output.key for output in outputs]


def start(engine: Scheduler, *requests: Request) -> None:
    for one in requests:
        assert engine.submit(one) is None
