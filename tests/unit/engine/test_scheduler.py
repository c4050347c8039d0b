"""What the scheduler runs and in which order, request by request; for everything at once see the properties beside."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FrameType

import pytest

from parleyd.engine.kv_cache import IntegrityError, KVLedger
from parleyd.engine.request import Batch
from parleyd.engine.scheduler import Scheduler
from parleyd.errors import StartupError
from parleyd.generation import EngineRequest, FinishReason, Output, SamplingParams

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


# Prefill and decode


def test_a_long_prompt_comes_in_chunks_and_samples_with_its_last() -> None:
    engine = scheduler(tokens=16)
    start(engine, request(1, 37))
    seen = []
    for _ in range(4):
        batch = engine.schedule()
        assert batch
        seen.append((*entries(batch)[0][1:], batch.num_samples))
        engine.commit(batch, [TOKEN] * batch.num_samples)
    assert seen == [(0, 16, 0), (16, 16, 0), (32, 5, 1), (37, 1, 1)]


def test_decodes_come_first_and_prompts_get_the_rest_of_the_budget() -> None:
    engine = scheduler(tokens=16)
    start(engine, request(1), request(2))
    step(engine)
    start(engine, request(3, 30), request(4, 5))
    batch = engine.schedule()
    assert entries(batch) == [(1, 3, 1), (2, 3, 1), (3, 0, 14)]
    assert batch
    assert (batch.num_decodes, batch.num_samples, batch.num_tokens) == (2, 2, 16)
    engine.commit(batch, [TOKEN] * 2)
    assert entries(engine.schedule()) == [(1, 4, 1), (2, 4, 1), (3, 14, 14)]


def test_prompt_tokens_beside_decodes_can_be_limited_further() -> None:
    engine = scheduler(tokens=16, mixed=6)
    start(engine, request(1, 14))
    assert entries(engine.schedule()) == [(1, 0, 14)]
    engine = scheduler(tokens=16, mixed=6)
    start(engine, request(1))
    step(engine)
    start(engine, request(2, 4), request(3, 4))
    assert entries(engine.schedule()) == [(1, 3, 1), (2, 0, 4), (3, 0, 2)]


def test_several_short_prompts_share_a_step() -> None:
    engine = scheduler(tokens=16)
    start(engine, *(request(key, 5) for key in (1, 2, 3, 4)))
    assert entries(engine.schedule()) == [(1, 0, 5), (2, 0, 5), (3, 0, 5), (4, 0, 1)]


def test_no_more_run_than_allowed() -> None:
    engine = scheduler(running=2)
    start(engine, request(1, max_new_tokens=1), request(2), request(3))
    assert keys(step(engine)) == [1, 2]
    assert keys(step(engine)) == [2, 3]


# Order


def test_requests_start_by_priority_then_arrival() -> None:
    engine = scheduler(running=1)
    start(
        engine,
        *(request(key, priority=p, max_new_tokens=1) for key, p in enumerate([0, 5, 0, 5, -1, 2**31 - 1])),
    )
    assert [step(engine)[0].key for _ in range(6)] == [5, 1, 3, 0, 2, 4]


def test_a_higher_priority_prompt_goes_before_one_already_begun() -> None:
    engine = scheduler(tokens=8)
    start(engine, request(1, 20))
    step(engine)
    start(engine, request(2, 6, priority=1), request(3, 6))
    assert entries(engine.schedule()) == [(2, 0, 6), (1, 8, 2)]


def test_nobody_passes_a_waiting_request_that_does_not_fit_yet() -> None:
    engine = scheduler(num_blocks=10)
    start(engine, request(1, 12))
    step(engine)
    start(engine, request(2, 36), request(3, 1))
    for _ in range(10):
        assert keys(step(engine)) == [1]
    engine.abort(1)
    assert entries(engine.schedule()) == [(2, 0, 16)]


def test_a_newcomer_leaves_each_running_sequence_a_block_to_grow_by() -> None:
    engine = scheduler(num_blocks=10)
    start(engine, request(1, 13))
    step(engine)
    start(engine, request(2, 24))
    step(engine)
    assert engine.stats().num_running == 1, "4 + 6 blocks would leave none"
    engine.abort(2)
    start(engine, request(3, 20))
    step(engine)
    assert engine.stats().num_running == 2


# Preemption


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


# The end


def test_a_stop_id_ends_with_stop_and_is_delivered() -> None:
    engine = scheduler()
    start(engine, request(1), request(2, stop_token_ids=(9,)), request(3, ignore_eos=True))
    batch = engine.schedule()
    assert batch
    assert engine.commit(batch, [EOS, 9, EOS]) == [
        Output(key=1, token_ids=(EOS,), finish_reason=FinishReason.STOP),
        Output(key=2, token_ids=(9,), finish_reason=FinishReason.STOP),
        Output(key=3, token_ids=(EOS,)),
    ]
    assert engine.stats().num_running == 1


@pytest.mark.parametrize(("num_prompt", "max_new_tokens", "expected"), [(3, 4, 4), (35, 40, 5), (39, 9, 1)])
def test_an_answer_ends_with_length_at_its_limit_or_the_contexts(
    num_prompt: int, max_new_tokens: int, expected: int
) -> None:
    engine = scheduler(tokens=40)
    start(engine, request(1, num_prompt, max_new_tokens=max_new_tokens))
    outputs = [output for _ in range(expected) for output in step(engine)]
    assert [output.finish_reason for output in outputs] == [None] * (expected - 1) + [FinishReason.LENGTH]
    assert engine.is_idle
    assert engine.stats().num_used_blocks == 0


def test_ids_already_delivered_count_but_are_not_delivered_again() -> None:
    engine = scheduler()
    start(engine, request(1, 3, output=(7, 8), max_new_tokens=4))
    assert entries(engine.schedule()) == [(1, 0, 5)]
    engine = scheduler()
    start(engine, request(1, 3, output=(7, 8), max_new_tokens=4))
    assert step(engine, 9) == [Output(key=1, token_ids=(9,))]
    assert step(engine, 10) == [Output(key=1, token_ids=(10,), finish_reason=FinishReason.LENGTH)]


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (request(1, output=(7, EOS)), FinishReason.STOP),
        (request(1, output=(7, 8), max_new_tokens=2), FinishReason.LENGTH),
        (request(1, num_prompt=37, output=(7, 8, 9)), FinishReason.LENGTH),
        (request(1, num_prompt=50), FinishReason.LENGTH),
    ],
)
def test_a_request_with_nothing_left_to_generate_ends_at_once(one: Request, reason: FinishReason) -> None:
    engine = scheduler()
    assert engine.submit(one) == Output(key=1, finish_reason=reason)
    assert engine.is_idle


def test_an_empty_prompt_is_an_error_of_its_own_request() -> None:
    output = scheduler().submit(request(1, prompt=()))
    assert output is not None
    assert output.error


def test_a_key_can_be_open_once_only() -> None:
    engine = scheduler()
    start(engine, request(1))
    with pytest.raises(ValueError, match="already open"):
        engine.submit(request(1))


def test_a_step_that_failed_ends_its_own_requests_only() -> None:
    engine = scheduler(running=2)
    start(engine, request(1), request(2), request(3))
    batch = engine.schedule()
    assert batch
    assert engine.fail(batch, "boom") == [Output(key=1, error="boom"), Output(key=2, error="boom")]
    assert engine.stats().num_used_blocks == 0
    assert keys(step(engine)) == [3]
    engine.check_integrity()


# Abort


def test_an_abort_between_schedule_and_commit_frees_its_blocks_and_drops_its_output() -> None:
    engine = scheduler()
    start(engine, request(1), request(2))
    batch = engine.schedule()
    assert batch
    engine.abort(1)
    assert engine.stats().num_used_blocks == 1
    assert len(batch.slots(BLOCK_SIZE)) == 6, "the batch can still be run as it was scheduled"
    assert keys(engine.commit(batch, [TOKEN, TOKEN])) == [2]
    engine.abort(2)
    engine.check_integrity()
    assert engine.stats().num_used_blocks == 0


def test_what_an_aborted_sequence_had_not_computed_is_never_found() -> None:
    engine = scheduler(tokens=40)
    prompt = tuple(range(20))
    start(engine, request(1, prompt=prompt))
    batch = engine.schedule()
    engine.abort(1)
    assert batch
    engine.commit(batch, [TOKEN])
    start(engine, request(2, prompt=prompt))
    assert entries(engine.schedule()) == [(2, 0, 20)]


def test_unknown_and_waiting_keys_can_be_aborted() -> None:
    engine = scheduler(running=1)
    start(engine, request(1), request(2), request(3))
    engine.abort(2)
    engine.abort(2)
    engine.abort(99)
    step(engine)
    engine.abort(1)
    assert keys(step(engine)) == [3]


def test_cancelled_waiting_requests_leave_nothing_behind() -> None:
    engine = scheduler(running=1)
    for key in range(1000):
        start(engine, request(key))
    step(engine)
    for key in range(999, 1, -1):
        engine.abort(key)
    assert engine.stats().num_waiting == 1
    assert len(engine._waiting._heap) <= 2


# Two batches in flight


def test_a_batch_can_be_scheduled_before_the_one_ahead_is_committed() -> None:
    engine = scheduler()
    start(engine, request(1, 3), request(2, 20, max_new_tokens=1))
    first, second = engine.schedule(), engine.schedule()
    assert first
    assert second
    assert entries(second) == [(1, 3, 1), (2, 13, 7)]
    assert [item.awaits_id for item in second.scheduled] == [True, False]
    assert list(second.token_ids())[:2] == [0, 2013]
    assert engine.commit(first, [11]) == [Output(key=1, token_ids=(11,))]
    assert keys(engine.commit(second, [12, 13])) == [1, 2]
    engine.check_integrity()


def test_an_id_sampled_after_the_end_is_dropped() -> None:
    engine = scheduler()
    start(engine, request(1))
    first, second = engine.schedule(), engine.schedule()
    assert first
    assert second
    assert engine.commit(first, [EOS])[0].is_last
    assert engine.commit(second, [TOKEN]) == []
    engine.check_integrity()


def test_nothing_is_scheduled_past_the_last_token() -> None:
    engine = scheduler()
    start(engine, request(1, max_new_tokens=1))
    first = engine.schedule()
    assert engine.schedule() is None
    assert first
    assert engine.commit(first, [TOKEN])[0].finish_reason is FinishReason.LENGTH


# Prefix cache


def test_cached_prompt_tokens_are_known_from_admission_on() -> None:
    engine = scheduler(tokens=40)
    prompt = tuple(range(20))
    start(engine, request(1, prompt=prompt))
    step(engine)
    start(engine, request(2, prompt=(*prompt, 99)), request(3, prompt=prompt, salt="tenant"))
    batch = engine.schedule()
    assert entries(batch) == [(1, 20, 1), (2, 20, 1), (3, 0, 20)]
    assert batch
    assert [item.sequence.cached_prompt_tokens for item in batch.scheduled] == [0, 20, 0]
    stats = engine.stats()
    assert (stats.num_prompt_tokens, stats.num_cached_prompt_tokens) == (61, 20)


@pytest.mark.parametrize("num_prompt", [2, 4, 11])
def test_a_prompt_is_computed_once_for_all_that_share_it(num_prompt: int) -> None:
    engine = scheduler(tokens=40)
    prompt = tuple(range(num_prompt))
    start(engine, request(1, prompt=prompt))
    step(engine)
    start(engine, request(2, prompt=prompt), request(3, prompt=prompt))
    batch = engine.schedule()
    assert entries(batch) == [(1, num_prompt, 1), (2, num_prompt - 1, 1), (3, num_prompt - 1, 1)]
    assert batch
    last_blocks = [item.block_ids[(num_prompt - 1) // BLOCK_SIZE] for item in batch.scheduled]
    assert batch.copies == [(last_blocks[0], last_blocks[1]), (last_blocks[0], last_blocks[2])]
    assert [item.sequence.cached_prompt_tokens for item in batch.scheduled] == [0, num_prompt - 1, num_prompt - 1]
    engine.check_integrity()


def test_a_prompt_in_flight_is_not_shared_before_it_is_computed() -> None:
    engine = scheduler(tokens=40)
    prompt = tuple(range(6))
    start(engine, request(1, prompt=prompt))
    first = engine.schedule()
    start(engine, request(2, prompt=prompt))
    second = engine.schedule()
    assert first and second
    assert (entries(second)[-1], second.copies) == ((2, 0, 6), [])


def test_the_next_turn_of_a_conversation_finds_the_answer_too() -> None:
    engine = scheduler(tokens=40)
    start(engine, request(1, prompt=tuple(range(6)), max_new_tokens=7))
    for _ in range(7):
        step(engine)
    start(engine, request(2, prompt=(*range(6), *[TOKEN] * 7, 50, 51)))
    batch = engine.schedule()
    assert entries(batch) == [(2, 12, 3)]


# Plain data for a model runner


def test_a_batch_tells_ids_positions_and_slots_end_to_end() -> None:
    engine = scheduler(tokens=8)
    start(engine, request(1, 3))
    step(engine)
    start(engine, request(2, 9))
    batch = engine.schedule()
    assert batch
    assert list(batch.token_ids()) == [TOKEN, *range(2000, 2007)]
    assert list(batch.positions()) == [3, *range(7)]
    own, other = (item.block_ids for item in batch.scheduled)
    expected = [own[0] * 4 + 3, *(other[p // 4] * 4 + p % 4 for p in range(7))]
    assert list(batch.slots(BLOCK_SIZE)) == expected


def test_commit_wants_one_id_for_each_that_samples() -> None:
    engine = scheduler()
    start(engine, request(1))
    batch = engine.schedule()
    assert batch
    with pytest.raises(ValueError, match="2 ids for 1"):
        engine.commit(batch, [TOKEN, TOKEN])


# Limits


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"num_blocks": 9, "context": 40}, "holds 36 tokens, but one full context takes 40"),
        ({"running": 20, "tokens": 16}, "a step of 16 tokens"),
        ({"running": 0}, "each of 0"),
    ],
)
def test_limits_that_could_never_work_are_refused_at_start(limits: dict[str, int], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        scheduler(**limits)


def test_one_sequence_of_the_full_context_fits_the_smallest_cache() -> None:
    engine = scheduler(num_blocks=10, context=40)
    start(engine, request(1, 30, max_new_tokens=100))
    while not engine.is_idle:
        step(engine)
        engine.check_integrity()
    assert engine.stats().num_generated_tokens == 10


def num_calls(engine: Scheduler) -> int:
    """Python and C functions called in one step."""
    count = 0

    def on_event(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    sys.setprofile(on_event)
    try:
        step(engine)
    finally:
        sys.setprofile(None)
    return count


def test_ten_thousand_waiting_requests_cost_a_step_nothing() -> None:
    quiet, crowded = scheduler(running=4), scheduler(running=4)
    for engine, num_requests in ((quiet, 4), (crowded, 10_000)):
        start(engine, *(request(key) for key in range(num_requests)))
        step(engine)
        engine.check_integrity()
    assert num_calls(crowded) <= num_calls(quiet) + 5


def test_a_request_lost_from_the_books_is_noticed() -> None:
    engine = scheduler()
    start(engine, request(1), request(2))
    step(engine)
    engine.check_integrity()
    engine._running[0].num_computed_tokens += 9
    with pytest.raises(IntegrityError, match="request 1 has 12 of 4 tokens computed"):
        engine.check_integrity()
    engine._running[0].num_computed_tokens -= 9
    del engine._sequences[2]
    with pytest.raises(IntegrityError, match="are not 1"):
        engine.check_integrity()
