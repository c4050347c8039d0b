"""Prompts beside running streams, in virtual time: streams keep their pace, prompts do not starve."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable, Iterator

import pytest

from parleyd.generation import EngineRequest, Output, SamplingParams
from parleyd.scheduling.kv_cache import KVLedger
from parleyd.scheduling.prefill_budget import PrefillBudget
from parleyd.scheduling.scheduler import Scheduler

# Seconds of a step: fixed, for each decode, for each prompt token.
MACHINES = [(0.010, 0.0005, 0.001), (0.004, 0.001, 0.0005), (0.030, 0.001, 0.002)]


def serve(
    budget: Callable[[int, float], int], observe: Callable[[int, int, float], None], machine: tuple[float, float, float]
) -> tuple[list[float], list[float]]:
    """Six streams run all the time while 40 prompts come by. Returns gaps between tokens, and times to first tokens."""
    fixed, _, per_token = machine
    chance = random.Random(0)
    scheduler = scheduler_with(budget)
    arrivals, at = [], 0.5
    for key in range(100, 140):
        at += chance.expovariate(1.0) * 4 * (fixed + 200 * per_token)
        arrivals.append((at, EngineRequest(key=key, prompt_ids=tuple(range(key, key + 200)), params=answer(20))))
    for key in range(6):
        scheduler.submit(EngineRequest(key=key, prompt_ids=(key,) * 8, params=answer(7000)))
    now, last, gaps, first = 0.0, dict[int, float](), [], dict[int, float]()
    due = {request.key: at for at, request in arrivals}
    while arrivals or len(first) < 46:
        while arrivals and arrivals[0][0] <= now:
            scheduler.submit(arrivals.pop(0)[1])
        seconds, outputs = step(scheduler, observe, machine)
        now += seconds
        for output in outputs:
            if output.key in last:
                gaps.append(now - last[output.key])
            else:
                first[output.key] = now - due.get(output.key, 0.0)
            last[output.key] = now
    return gaps, [first[key] for key in due]


def scheduler_with(budget: Callable[[int, float], int]) -> Scheduler:
    return Scheduler(
        KVLedger(8000, 32),
        max_running=64,
        max_batch_tokens=512,
        max_context_tokens=8000,
        mixed_prefill_tokens=budget,
    )


def step(
    scheduler: Scheduler, observe: Callable[[int, int, float], None], machine: tuple[float, float, float]
) -> tuple[float, list[Output]]:
    """How long it takes, and what it makes."""
    fixed, per_decode, per_token = machine
    batch = scheduler.schedule()
    assert batch is not None
    num_prefill = batch.num_tokens - batch.num_decodes
    seconds = fixed + per_decode * batch.num_decodes + per_token * num_prefill
    observe(batch.num_decodes, num_prefill, seconds)
    return seconds, scheduler.commit(batch, [7] * batch.num_samples)


def answer(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_streams_keep_their_pace_while_prompts_come(machine: tuple[float, float, float]) -> None:
    budget = PrefillBudget()
    gaps, first = serve(budget, budget.observe, machine)
    assert statistics.quantiles(gaps, n=20)[-1] <= 2 * statistics.median(gaps)
    # Alone a prompt takes a step of its own; beside six streams, at most four times as long at the median.
    assert statistics.median(first) < 4 * (machine[0] + 200 * machine[2])


@pytest.mark.parametrize("arrivals_per_s", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("machine", [(0.012, 0.002, 0.002), (0.003, 0.0008, 0.00075), (0.002, 0.0005, 0.0004)], ids=str)
def test_streams_that_are_soon_replaced_keep_it_too(machine: tuple[float, float, float], arrivals_per_s: float) -> None:
    """Eight of 256 tokens each beside prompts of 1,000, on machines that can and that cannot keep up with them."""
    for seed in (0, 3):
        chance = random.Random(seed)
        budget = PrefillBudget()
        scheduler = scheduler_with(budget)
        requests = itertools.count()

        def submit(
            num_prompt_tokens: int,
            num_tokens: int,
            scheduler: Scheduler = scheduler,
            requests: Iterator[int] = requests,
        ) -> int:
            key = next(requests)
            prompt = tuple(range(31 * key, 31 * key + num_prompt_tokens))
            scheduler.submit(EngineRequest(key=key, prompt_ids=prompt, params=answer(num_tokens)))
            return key

        streams = {submit(64, 256) for _ in range(8)}
        now, next_arrival, last, gaps = 0.0, chance.expovariate(arrivals_per_s), dict[int, float](), []
        while now < 60.0:
            while next_arrival <= now:
                submit(1000, 8)
                next_arrival += chance.expovariate(arrivals_per_s)
            seconds, outputs = step(scheduler, budget.observe, machine)
            now += seconds
            for output in outputs:
                if output.key in streams & last.keys():
                    gaps.append(now - last[output.key])
                last[output.key] = now
                if output.finish_reason is not None and output.key in streams:
                    streams ^= {output.key, submit(64, 256)}
        assert statistics.quantiles(gaps, n=20)[-1] <= 1.6 * statistics.median(gaps)


def test_with_a_fixed_budget_they_would_not() -> None:
    gaps, _ = serve(lambda *_: 64, lambda *_: None, MACHINES[1])
    assert statistics.quantiles(gaps, n=20)[-1] > 2 * statistics.median(gaps)


def exhausted() -> PrefillBudget:
    """One whose streams have had all that they can bear: a prompt token costs 1 ms, a decode step 100."""
    budget = PrefillBudget()
    budget.observe(0, 100, 0.1)
    budget.observe(8, 0, 0.1)
    for _ in range(4):
        budget.observe(8, 200, 0.3)
    return budget


def test_tokens_are_granted_whatever_a_step_costs() -> None:
    budget = PrefillBudget()
    assert budget(3, 1) > 0
    for _ in range(100):
        budget.observe(4, 0, 0.001)
        budget.observe(4, 100, 5.0)
        assert budget(4, 1) > 0
    budget.observe(4, 10, 0.0001)  # a clock that jumps
    assert budget(1, 1) > 0


def test_streams_can_bear_no_more_where_prompts_never_leave_them_alone() -> None:
    budget = PrefillBudget()
    for _ in range(4):
        assert budget(8, 0.5) == 512
        budget.observe(8, 512, 0.6)
    assert budget(8, 0.5) < 8
    budget.observe(8, 4, 0.1)
    budget.observe(8, 4, 0.1)
    assert budget(8, 0.5) > 8


def test_what_was_seen_beside_few_streams_serves_for_many() -> None:
    budget = exhausted()
    assert budget(8, 1) == budget(64, 1) == 30


def test_many_short_prompts_go_first() -> None:
    budget = exhausted()
    assert budget(40, 7.5) == budget(8, 2) == 512
    assert budget(8, 0.5) < 512


def test_slow_steps_are_earned() -> None:
    budget = exhausted()
    for _ in range(28):
        budget.observe(8, 0, 0.1)
    assert budget(8, 1) < 512
    budget.observe(8, 0, 0.1)
    assert budget(8, 1) == 512


def test_slow_steps_that_were_not_earned_are_made_up_for() -> None:
    budget = exhausted()
    budget.observe(16, 512, 0.6)
    for _ in range(29 + 57):
        assert budget(8, 1) < 512
        budget.observe(8, 0, 0.1)
    assert budget(8, 1) == 512
