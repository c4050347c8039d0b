"""Random traffic against a model that would betray any lost, doubled or misplaced token, and any slot read in error."""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from parleyd.generation import FinishReason, Output, SamplingParams
from parleyd.scheduling.kv_cache import KVLedger
from parleyd.scheduling.request import Batch, Scheduled, Sequence, SequenceState
from parleyd.scheduling.scheduler import Scheduler
from tests.support.scheduling import Request

VOCAB_SIZE, EOS = 13, 0
CONTEXT = 40


# The model: a token's key and value stand for all tokens up to it, and decide the next.


def key_value(before: int, token_id: int) -> int:
    return (before * 1_000_003 + token_id + 1) % (2**61 - 1)


def before_the_first(salt: str) -> int:
    """Tenants with different salts have different models, so that sharing between them would show."""
    return sum(salt.encode())


def next_token(last_key_value: int) -> int:
    return last_key_value % VOCAB_SIZE


def answer(request: Request) -> tuple[list[int], FinishReason]:
    """The reference: one request alone, without a cache."""
    state = before_the_first(request.cache_salt)
    for token_id in request.prompt_ids + request.output_ids:
        state = key_value(state, token_id)
    stop_ids = {*request.params.stop_token_ids, *(() if request.params.ignore_eos else (EOS,))}
    output = list(request.output_ids)
    room = min(request.params.max_new_tokens, CONTEXT - len(request.prompt_ids))
    if stop_ids.intersection(output):
        return [], FinishReason.STOP
    while len(output) < room:
        output.append(next_token(state))
        state = key_value(state, output[-1])
        if output[-1] in stop_ids:
            return output[len(request.output_ids) :], FinishReason.STOP
    return output[len(request.output_ids) :], FinishReason.LENGTH


@dataclass
class Step:
    """A batch as a device has it: nothing that changes later."""

    batch: Batch
    inputs: list[tuple[list[int], list[int], list[int]]] = field(default_factory=list)  # ids, slots written, slots read


class Device:
    """Runs steps in order on paged memory, and checks whatever it reads."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._memory: dict[int, int] = {}
        self._last_sampled: dict[Sequence, int] = {}
        self._truth: dict[Sequence, list[int]] = {}

    def launch(self, batch: Batch) -> Step:
        ids, slots, positions = list(batch.token_ids()), list(batch.slots(self._block_size)), list(batch.positions())
        assert len(ids) == len(slots) == len(positions) == batch.num_tokens
        assert len(set(slots)) == len(slots), "two tokens of a step in one slot"
        step, first = Step(batch), 0
        for item in batch.scheduled:
            last = first + item.num_tokens
            assert positions[first:last] == list(range(item.start, item.start + item.num_tokens))
            read = [self._slot(item.block_ids, position) for position in range(item.start + item.num_tokens)]
            assert read[item.start :] == slots[first:last]
            step.inputs.append((ids[first:last], slots[first:last], read))
            first = last
        return step

    def run(self, step: Step) -> list[int]:
        self._copy(step.batch.copies)
        sampled = []
        for item, (ids, written, read) in zip(step.batch.scheduled, step.inputs, strict=True):
            sequence = item.sequence
            if sequence.state is SequenceState.FINISHED:  # aborted or ended since: what it writes must harm nobody
                self._memory.update(dict.fromkeys(written, -1))
                sampled += [EOS] * item.samples
                continue
            known_ids = [self._last_sampled[sequence]] if item.awaits_id else ids
            state = self._memory[read[item.start - 1]] if item.start else before_the_first(sequence.cache_salt)
            for slot, token_id in zip(written, known_ids, strict=True):
                state = self._memory[slot] = key_value(state, token_id)
            truth = self._true_key_values(sequence, item.start + item.num_tokens)
            assert [self._memory[slot] for slot in read] == truth, "a slot does not hold what its reader takes it for"
            if item.samples:
                self._last_sampled[sequence] = next_token(state)
                sampled.append(next_token(state))
        return sampled

    def _copy(self, copies: list[tuple[int, int]]) -> None:
        pairs = [
            (a * self._block_size + i, b * self._block_size + i) for a, b in copies for i in range(self._block_size)
        ]
        # Where nobody has written yet there is nothing that anybody may read.
        read = [(target, self._memory.get(source, -1)) for source, target in pairs]
        self._memory.update(read)

    def _slot(self, block_ids: array[int], position: int) -> int:
        return block_ids[position // self._block_size] * self._block_size + position % self._block_size

    def _true_key_values(self, sequence: Sequence, length: int) -> list[int]:
        truth = self._truth.setdefault(sequence, [])
        for token_id in sequence.token_ids[len(truth) :]:
            truth.append(key_value(truth[-1] if truth else before_the_first(sequence.cache_salt), token_id))
        return truth[:length]


class Service:
    """A scheduler, its device and its clients. `depth` batches are in flight at most; each runs as late as it can."""

    def __init__(
        self,
        *,
        num_spare_blocks: int,
        block_size: int,
        max_running: int,
        max_batch_tokens: int,
        mixed_prefill_tokens: Callable[[int, float], int] | None,
        depth: int,
    ) -> None:
        self.ledger = KVLedger(-(-CONTEXT // block_size) + num_spare_blocks, block_size)
        self.scheduler = Scheduler(
            self.ledger,
            max_running=max_running,
            max_batch_tokens=max_batch_tokens,
            max_context_tokens=CONTEXT,
            eos_token_ids=(EOS,),
            mixed_prefill_tokens=mixed_prefill_tokens,
        )
        self.device = Device(block_size)
        self.max_running, self.max_batch_tokens, self.depth = max_running, max_batch_tokens, depth
        self.in_flight: deque[Step] = deque()
        self.open: dict[int, Request] = {}
        self.received: dict[int, list[int]] = {}
        self.num_received = 0
        self.num_submitted = 0

    def submit(self, request: Request) -> None:
        self.num_submitted += 1
        self.open[request.key], self.received[request.key] = request, []
        if output := self.scheduler.submit(request):
            assert output.is_last
            self.receive(output)

    def abort(self, key: int) -> None:
        self.scheduler.abort(key)
        del self.open[key]

    def receive(self, output: Output) -> None:
        request = self.open[output.key]  # fails for an output after the last, or after an abort
        self.received[output.key] += output.token_ids
        self.num_received += len(output.token_ids)
        expected, reason = answer(request)
        assert self.received[output.key] == expected[: len(self.received[output.key])]
        if output.is_last:
            assert (self.received[output.key], output.finish_reason) == (expected, reason)
            del self.open[output.key]

    def step(self) -> None:
        batch = self.schedule() if len(self.in_flight) < self.depth else None
        if batch is not None:
            self.in_flight.append(self.device.launch(batch))
        if batch is None or len(self.in_flight) == self.depth:
            if self.in_flight:
                self.commit()
            else:
                assert self.scheduler.is_idle, "requests wait, and nothing runs"

    def commit(self) -> None:
        step = self.in_flight.popleft()
        for output in self.scheduler.commit(step.batch, self.device.run(step)):
            self.receive(output)

    def fail(self) -> None:
        """The oldest batch in flight breaks, as an engine sees it: none of its results can be used."""
        step = self.in_flight.popleft()
        for output in self.scheduler.fail(step.batch, "broken"):
            assert output.error
            del self.open[output.key]

    def drain(self) -> None:
        num_steps = 0
        while self.open or self.in_flight:
            self.step()
            num_steps += 1
            assert num_steps < 200 * (self.num_submitted + 1), "a request starves"
        self.check()
        assert self.scheduler.is_idle
        stats = self.scheduler.stats()
        assert (stats.num_used_blocks, stats.num_waiting, stats.num_running) == (0, 0, 0)
        assert stats.num_generated_tokens == self.num_received

    def check(self) -> None:
        self.scheduler.check_integrity()
        assert len(self.open) == len(self.scheduler._sequences)

    def schedule(self) -> Batch | None:
        """One batch, checked against the policy."""
        before = list(self.scheduler._running)
        decoding = [s for s in before if s.num_tokens - s.num_computed_tokens == 1 and s.num_tokens < s.max_length]
        batch = self.scheduler.schedule()
        running = self.scheduler._running
        waiting = [s for s in self.scheduler._sequences.values() if s.state is SequenceState.WAITING]
        scheduled = batch.scheduled if batch else []
        chosen = [item.sequence for item in scheduled]

        assert all(item.num_tokens > 0 for item in scheduled)
        assert sum(item.num_tokens for item in scheduled) <= self.max_batch_tokens
        assert len(running) <= self.max_running
        assert len(set(chosen)) == len(chosen)
        assert all(s in chosen or s in waiting for s in decoding), "a stream lost its pace"
        preempted = [s for s in before if s in waiting]
        assert all(s.rank < victim.rank for victim in preempted for s in running), "the wrong one was preempted"
        admitted = [s for s in running if s not in before]
        assert all(s.rank < waiter.rank for s in admitted for waiter in waiting), "someone was passed in the queue"
        for item in scheduled:
            first, last = (
                item.start // self.ledger.block_size,
                (item.start + item.num_tokens - 1) // self.ledger.block_size,
            )
            for index in range(first, last + 1):
                block_id = item.block_ids[index]
                assert self.ledger._ref_counts[block_id] == 1, "a shared block is written"
                assert not self.ledger._hashes[block_id] or self._is_behind_prompt(item, index), "it is registered"
        targets = [target for _, target in batch.copies] if batch else []
        first_blocks = {item.block_ids[item.start // self.ledger.block_size] for item in scheduled}
        assert len(set(targets)) == len(targets) and first_blocks.issuperset(targets), (
            "a copy that nobody has asked for"
        )
        return batch

    def _is_behind_prompt(self, item: Scheduled, index: int) -> bool:
        """Whether the block is that in which the prompt ends, registered for that alone, and written behind it."""
        end = item.sequence.num_prompt_tokens
        (digest,) = self.ledger._hashes[item.block_ids[index]]
        is_of_prompt = index == end // self.ledger.block_size and digest == self.ledger._digest(item.sequence, end)
        return is_of_prompt and item.start >= end


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
