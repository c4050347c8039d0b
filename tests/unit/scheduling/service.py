"""A scheduler at work, its decisions checked against the policy and its answers against the model's."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from parleyd.generation import Output
from parleyd.scheduling.kv_cache import KVLedger
from parleyd.scheduling.request import Batch, Scheduled, SequenceState
from parleyd.scheduling.scheduler import Scheduler
from tests.support.scheduling import Request
from tests.unit.scheduling.device import Device, Step
from tests.unit.scheduling.token_model import CONTEXT, EOS, answer


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
        targets = [copy.target for copy in batch.copies] if batch else []
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
