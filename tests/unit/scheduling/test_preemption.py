"""Who gives way when the blocks run out, and what it costs them."""

from __future__ import annotations

import pytest

from parleyd.scheduling.scheduler import Scheduler
from tests.support.scheduling import entries, keys, request, scheduler, start, step


def exhausted(*priorities: int) -> Scheduler:
    """Three running sequences with prompts of two full blocks, in a pool that has three left, one for each."""
    engine = scheduler(num_blocks=10, tokens=40, context=40)
    start(engine, *(request(key, 6, priority=p) for key, p in enumerate(priorities)))
    step(engine)
    assert engine.stats().num_running == 3
    return engine


@pytest.mark.parametrize(
    ("priorities", "preempted"), [((0, 0, 0), [2, 1]), ((0, 0, 1), [1, 0]), ((0, 1, 1), [0, 2]), ((2, 1, 0), [2, 1])]
)
def test_the_lowest_priority_then_the_youngest_is_preempted(priorities: tuple[int, ...], preempted: list[int]) -> None:
    engine = exhausted(*priorities)
    seen: list[int] = []
    for _ in range(16):
        outputs = step(engine)
        waiting = [key for key in range(3) if key not in keys(outputs)]
        seen += [key for key in waiting if key not in seen]
        engine.check_integrity()
    assert seen == preempted


def test_a_preempted_sequence_computes_its_own_tokens_again_and_repeats_none() -> None:
    engine = scheduler(num_blocks=10, tokens=40, running=2)
    start(engine, request(1, 16), request(2, 16))
    received: dict[int, list[int]] = {1: [], 2: []}
    token_id, recomputed = 100, []
    while not engine.is_idle:
        batch = engine.schedule()
        assert batch
        recomputed += [e for e in entries(batch) if e[0] == 2 and e[2] > 1]
        assert all(item.sequence.cached_prompt_tokens == 0 for item in batch.scheduled), "its own blocks are no hit"
        ids = list(range(token_id, token_id + batch.num_samples))
        token_id += batch.num_samples
        for output in engine.commit(batch, ids):
            received[output.key] += output.token_ids
    assert engine.stats().num_preemptions == 1
    assert len(recomputed) == 2
    assert recomputed[1][1] > 0, "what was not evicted is not computed again"
    assert [len(ids) for ids in received.values()] == [20, 20]
    assert sorted(received[1] + received[2]) == list(range(100, 140))
    assert received[2] == sorted(received[2])


def test_a_preempted_sequence_stands_before_those_that_came_after_it() -> None:
    engine = exhausted(0, 0, 0)
    start(engine, request(7), request(8))
    while engine.stats().num_preemptions < 2:
        step(engine)
    engine.abort(0)
    assert [key for key, _, _ in entries(engine.schedule())] == [1, 2]
