"""Random traffic against a model that would betray any lost, doubled or misplaced token, and any slot read in error."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from parleyd.generation import SamplingParams
from tests.support.scheduling import Request
from tests.unit.scheduling.service import Service
from tests.unit.scheduling.token_model import CONTEXT, VOCAB_SIZE, answer


def make_request(
    key: int,
    prefix: int,
    length: int,
    tail: list[int],
    *,
    priority: int,
    salt: str,
    max_new_tokens: int,
    stop_token_ids: tuple[int, ...] = (),
    ignore_eos: bool,
    num_delivered: int = 0,
) -> Request:
    """Prompts begin like others' with the same `prefix`, so that blocks are shared."""
    prompt = [(prefix * 5 + position * 3) % VOCAB_SIZE for position in range(length)] + tail
    request = Request(
        key=key,
        prompt_ids=tuple(prompt)[: CONTEXT - 1],
        params=SamplingParams(max_new_tokens=max_new_tokens, stop_token_ids=stop_token_ids, ignore_eos=ignore_eos),
        priority=priority,
        cache_salt=salt,
    )
    return replace(request, output_ids=tuple(answer(request)[0][:num_delivered]))


class Traffic(RuleBasedStateMachine):
    """Requests come, are cancelled and answered, in any order."""

    @initialize(
        num_spare_blocks=st.integers(0, 12),
        block_size=st.sampled_from([1, 2, 4]),
        max_running=st.integers(1, 6),
        max_batch_tokens=st.integers(6, 24),
        mixed_prefill_tokens=st.none()
        | st.functions(like=lambda num_decodes, num_prompts: 0, returns=st.integers(0, 8)),
        depth=st.integers(1, 3),
    )
    def start(self, **limits: Any) -> None:
        self.service = Service(**limits)
        self.next_key = 0
        self.asked: list[Request] = []

    @rule(
        count=st.integers(1, 4),
        prefix=st.integers(0, 1),
        length=st.sampled_from([0, 3, 8, 16, 30]),
        tail=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=9),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        salt=st.sampled_from(["", "", "a"]),
        max_new_tokens=st.integers(1, 25),
        stop_token_ids=st.sampled_from([(), (), (7,)]),
        ignore_eos=st.booleans(),
        num_delivered=st.sampled_from([0, 0, 0, 3, 50]),
    )
    def submit(self, count: int, prefix: int, length: int, tail: list[int], **how: Any) -> None:
        for _ in range(count):
            self.ask(make_request(self.next_key, prefix, length, tail, **how))

    @precondition(lambda self: self.asked)
    @rule(
        pick=st.integers(0, 3), count=st.integers(1, 4), max_new_tokens=st.integers(1, 25), num_steps=st.integers(0, 2)
    )
    def ask_again(self, pick: int, count: int, max_new_tokens: int, num_steps: int) -> None:
        """The same prompt for other answers, after a while or at once: as the choices of one request."""
        self.step(num_steps)
        one = self.asked[-1 - pick % len(self.asked)]
        for _ in range(count):
            self.ask(replace(one, key=self.next_key, params=replace(one.params, max_new_tokens=max_new_tokens)))

    def ask(self, request: Request) -> None:
        self.asked.append(request)
        self.service.submit(request)
        self.next_key += 1

    @precondition(lambda self: self.service.open)
    @rule(pick=st.integers(0, 100))
    def abort(self, pick: int) -> None:
        keys = list(self.service.open)
        self.service.abort(keys[pick % len(keys)])

    @rule(num_steps=st.sampled_from([1, 1, 2, 5, 12]))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.service.step()
            self.service.check()

    @precondition(lambda self: self.service.in_flight)
    @rule()
    def fail(self) -> None:
        self.service.fail()

    @invariant()
    def books_are_in_order(self) -> None:
        if hasattr(self, "service"):
            self.service.check()

    def teardown(self) -> None:
        if hasattr(self, "service"):
            self.service.drain()


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(
    max_examples=300, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


def random_request(chance: random.Random, key: int) -> Request:
    return make_request(
        key,
        prefix=chance.randrange(2),
        length=chance.choice([0, 8, 20]),
        tail=[chance.randrange(VOCAB_SIZE) for _ in range(chance.randint(1, 12))],
        priority=chance.choice([0, 0, 1]),
        salt=chance.choice(["", "a"]),
        max_new_tokens=chance.randint(1, 25),
        ignore_eos=chance.random() < 0.5,
    )


def make_service(depth: int) -> Service:
    return Service(
        num_spare_blocks=8,
        block_size=4,
        max_running=8,
        max_batch_tokens=24,
        mixed_prefill_tokens=None,
        depth=depth,
    )


def test_a_thousand_random_cancels_leave_the_ledger_whole() -> None:
    chance = random.Random(0)
    for depth in (1, 2):
        service, key, num_cancelled = make_service(depth), 0, 0
        while num_cancelled < 1000:
            while len(service.open) < 12:
                service.submit(random_request(chance, key))
                key += 1
            if chance.random() < 0.3:
                service.abort(chance.choice(list(service.open)))
                num_cancelled += 1
            else:
                service.step()
            service.check()
        service.drain()
        stats = service.scheduler.stats()
        assert stats.num_preemptions > 20
        assert stats.num_cached_prompt_tokens > 1000


def test_a_class_of_equals_is_served_in_order_however_many_come_after() -> None:
    chance = random.Random(1)
    service = make_service(depth=1)
    patient = Request(key=-1, prompt_ids=tuple(range(1, 13)) * 3, params=SamplingParams(max_new_tokens=4))
    for key in range(20):
        service.submit(random_request(chance, key))
    service.submit(patient)
    num_steps = 0
    while -1 in service.open:
        service.step()
        num_steps += 1
        service.submit(Request(key=1000 + num_steps, prompt_ids=(1, 2, 3), params=SamplingParams(max_new_tokens=20)))
        assert num_steps < 300
    service.drain()
