"""What runs in the next step: continuous batching with chunked prefill, priorities and preemption by recompute.

Called by the batching engine from its one thread; pure policy, no torch.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Ids
from heapq import merge
from itertools import chain
from operator import attrgetter

from parleyd.errors import StartupError
from parleyd.generation import NOT_FINITE, EngineRequest, EngineStats, Output, TokenLogprob
from parleyd.scheduling.kv_cache import IntegrityError, KVLedger
from parleyd.scheduling.request import Batch, Grammar, Sequence, SequenceState

_NONE: Mapping[int, TokenLogprob] = {}
_RANK = attrgetter("rank")
# Where each prompt token costs as much as any, a step takes no further prompt once it has so many tokens for each
# sequence: of few prompts that come together, one after the other is done. Of many, that would take more steps than
# it spares them waiting.
_ENOUGH_TOKENS = 16


class Scheduler:
    """Decides by rank: higher priority first, then arrival. Nobody passes a waiting request that outranks them.

    A batch may be scheduled before the one ahead of it is committed, so that a device never waits for us: see
    `Scheduled.awaits_id`. Batches must run, and be committed, in the order in which they were scheduled. Blocks are
    freed at once, whatever is in flight: who gets them next runs in a later batch and writes a slot before reading it.
    """

    def __init__(
        self,
        ledger: KVLedger,
        *,
        max_running: int,
        max_batch_tokens: int,
        max_context_tokens: int,
        eos_token_ids: Ids[int] = (),
        mixed_prefill_tokens: Callable[[int, float], int] | None = None,
    ) -> None:
        """`mixed_prefill_tokens`: prompt tokens in a step, where less than the whole budget, as each costs as much as
        any: by the number of decodes beside them, and of prompts that the whole budget would finish.

        Raises StartupError where one sequence of the full context, or one token for each that runs, would not fit.
        """
        if ledger.num_blocks_for(max_context_tokens) > ledger.num_blocks:
            raise StartupError(
                f"the KV cache holds {ledger.num_blocks * ledger.block_size} tokens, "
                f"but one full context takes {max_context_tokens}"
            )
        if not 1 <= max_running <= max_batch_tokens:
            raise StartupError(f"a step of {max_batch_tokens} tokens has not one for each of {max_running} requests")
        self._ledger = ledger
        self._max_running = max_running
        self._max_batch_tokens = max_batch_tokens
        self._mixed_prefill_tokens = mixed_prefill_tokens
        self._max_context_tokens = max_context_tokens
        self._eos_token_ids = frozenset(eos_token_ids)
        self._sequences: dict[int, Sequence] = {}
        # Both by rank, so that a preempted sequence waits before all that came after it.
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._num_arrivals = 0
        self._counts = Counter[str]()  # those of EngineStats that only rise

    @property
    def is_idle(self) -> bool:
        """Whether no request is open."""
        return not self._sequences

    def submit(self, request: EngineRequest, grammar: Grammar | None = None) -> Output | None:
        """Queues a request. Returns its only output where there is nothing to generate.

        `grammar`, of a request that has one, is where its output ids have left it.
        """
        if request.key in self._sequences:
            raise ValueError(f"a request with key {request.key} is already open")
        if not (request.prompt_ids or request.output_ids):
            return Output(key=request.key, error="the prompt has no tokens")
        self._num_arrivals += 1
        sequence = Sequence(request, self._num_arrivals, self._eos_token_ids, self._max_context_tokens, grammar)
        if sequence.finish_reason is not None:
            return Output(key=request.key, finish_reason=sequence.finish_reason)
        self._sequences[request.key] = sequence
        _insert(self._waiting, sequence)
        return None

    def abort(self, key: int) -> None:
        """Ends a request without output and frees its blocks. Unknown keys are ignored."""
        if sequence := self._sequences.get(key):
            self._end(sequence)

    def schedule(self) -> Batch | None:
        """The next batch; None where there is nothing to run, or nothing before a batch in flight is committed."""
        batch = Batch()
        prefills = self._schedule_decodes(batch)
        self._schedule_prefills(batch, prefills)
        return batch if batch.scheduled else None

    def commit(
        self, batch: Batch, token_ids: Ids[int | None], logprobs: Mapping[int, TokenLogprob] = _NONE
    ) -> list[Output]:
        """Takes one sampled id for each entry of the batch that samples, in its order; None ends the request.

        `logprobs` are passed on: those of the ids at these places in `token_ids`.
        """
        if len(token_ids) != batch.num_samples:
            raise ValueError(f"{len(token_ids)} ids for {batch.num_samples} sequences that sample")
        outputs = []
        sampled = enumerate(token_ids)
        for sequence, _, start, num_tokens, samples, _ in batch.scheduled:
            index, token_id = next(sampled) if samples else (-1, None)
            sequence.num_in_flight -= 1
            if sequence.state is SequenceState.FINISHED:  # aborted, or ended by the batch before
                continue
            if samples and token_id is None:
                # Its keys and values may be NaN, and so may all be that is computed from them.
                self._ledger.forget(sequence)
                self._end(sequence)
                outputs.append(Output(key=sequence.key, error=NOT_FINITE))
                continue
            if sequence.state is SequenceState.RUNNING:  # else preempted: its blocks are gone, its id still counts
                self._ledger.register(sequence, start, start + num_tokens)
            if token_id is not None:
                sequence.append(token_id)
                if sequence.grammar is not None and sequence.grammar.error is not None:
                    self._end(sequence)
                    outputs.append(Output(key=sequence.key, grammar_error=sequence.grammar.error))
                    continue
                reason = sequence.finish_reason
                if reason is not None:
                    self._end(sequence)
                outputs.append(
                    Output(
                        key=sequence.key,
                        token_ids=(token_id,),
                        logprobs=(logprobs[index],) if index in logprobs else (),
                        finish_reason=reason,
                        cached_prompt_tokens=sequence.cached_prompt_tokens or 0,
                    )
                )
        self._counts["num_generated_tokens"] += sum(len(output.token_ids) for output in outputs)
        return outputs

    def fail(self, batch: Batch, error: str) -> list[Output]:
        """Ends the requests of a batch that could not be run; call it instead of `commit`."""
        outputs = []
        for item in batch.scheduled:
            item.sequence.num_in_flight -= 1
            if item.sequence.state is not SequenceState.FINISHED:
                self._end(item.sequence)
                outputs.append(Output(key=item.sequence.key, error=error))
        return outputs

    def stats(self) -> EngineStats:
        """Counts for metrics, at no cost."""
        return EngineStats(
            num_waiting=len(self._waiting),
            num_running=len(self._running),
            num_blocks=self._ledger.num_blocks,
            num_used_blocks=self._ledger.num_used,
            **self._counts,
        )

    def check_integrity(self) -> None:
        """Raises IntegrityError unless every block and every token of every open request is accounted for."""
        self._ledger.check_integrity(sequence.block_ids for sequence in self._running)
        if [s.rank for s in self._running] != sorted({s.rank for s in self._running}):
            raise IntegrityError("the running sequences are not each there once, by rank")
        if len(self._running) > self._max_running:
            raise IntegrityError(f"{len(self._running)} sequences run, above the limit of {self._max_running}")
        if len(self._running) + len(self._waiting) != len(self._sequences):
            raise IntegrityError(
                f"{len(self._running)} running + {len(self._waiting)} waiting requests are not {len(self._sequences)}"
            )
        for sequence in self._sequences.values():
            self._check_sequence(sequence)

    def _check_sequence(self, sequence: Sequence) -> None:
        name = f"request {sequence.key}"
        num_computed, num_blocks = sequence.num_computed_tokens, len(sequence.block_ids)
        if sequence.state is SequenceState.FINISHED or sequence.finish_reason is not None:
            raise IntegrityError(f"{name} has finished but is still open")
        if not 0 <= sequence.num_pending <= sequence.num_in_flight:
            raise IntegrityError(f"{name} awaits {sequence.num_pending} ids from {sequence.num_in_flight} batches")
        if sequence.state is SequenceState.WAITING and (num_computed or num_blocks):
            raise IntegrityError(f"{name} waits, but holds {num_blocks} blocks for {num_computed} tokens")
        if not sequence.num_prompt_tokens <= len(sequence.token_ids) < sequence.max_length:
            raise IntegrityError(f"{name} has {len(sequence.token_ids)} tokens of at most {sequence.max_length}")
        if not num_computed < sequence.num_tokens <= sequence.max_length:
            raise IntegrityError(f"{name} has {num_computed} of {sequence.num_tokens} tokens computed")
        if num_computed > num_blocks * self._ledger.block_size:
            raise IntegrityError(f"{name} has {num_computed} tokens computed into {num_blocks} blocks")

    def _schedule_decodes(self, batch: Batch) -> list[Sequence]:
        """One token for each sequence that has only that to compute. Returns those that have more."""
        prefills: list[Sequence] = []
        for sequence in self._running:  # from which `_make_room` takes the last ones away
            if sequence.num_pending and sequence.grammar is not None:
                continue  # what may come next is not known before the id that is being sampled
            num_tokens = len(sequence.token_ids) + sequence.num_pending
            if num_tokens - sequence.num_computed_tokens > 1:
                prefills.append(sequence)
            elif num_tokens < sequence.max_length and self._make_room(sequence):
                batch.add(sequence, 1)
        batch.num_decodes = len(batch.scheduled)
        return prefills

    def _make_room(self, sequence: Sequence) -> bool:
        """Gives the sequence's next token a slot, at the cost of the last in rank; False where that is itself."""
        while not self._ledger.can_append(sequence):
            # Ranks behind this one, so it is not in the batch yet.
            victim = self._running.pop()
            self._preempt(victim)
            if victim is sequence:
                return False
        self._ledger.append(sequence)
        return True

    def _preempt(self, victim: Sequence) -> None:
        # Its tokens are kept: computed again as a prompt, they go on where they were, often from the prefix cache.
        self._ledger.free(victim)
        victim.state = SequenceState.WAITING
        self._counts["num_preemptions"] += 1
        _insert(self._waiting, victim)

    def _schedule_prefills(self, batch: Batch, prefills: list[Sequence]) -> None:
        """Spends what the decodes left of the budget on prompts, begun ones and waiting ones together by rank."""
        budget = self._max_batch_tokens - batch.num_tokens
        enough = self._max_batch_tokens
        if self._mixed_prefill_tokens is not None:
            enough = _ENOUGH_TOKENS * (len(self._running) + len(self._waiting))
            if batch.num_decodes:
                allowed = self._mixed_prefill_tokens(batch.num_decodes, self._num_finished(prefills, budget))
                budget = min(budget, max(allowed, 1))  # none at all would leave prompts waiting for every stream to end
        is_admitting = True
        num_places = self._max_running - len(self._running)
        for sequence in merge(prefills, self._waiting[:num_places], key=_RANK):
            if budget <= 0 or batch.num_tokens >= enough:
                return
            if sequence.state is SequenceState.WAITING:
                is_admitting = is_admitting and self._admit(sequence, batch)
                if not is_admitting:
                    continue
            num_tokens = min(budget, sequence.num_tokens - sequence.num_computed_tokens)
            batch.add(sequence, num_tokens)
            budget -= num_tokens

    def _num_finished(self, prefills: list[Sequence], budget: int) -> float:
        """How many prompts so many tokens would finish, if all were as long as the first in line."""
        first = next(chain(prefills, self._waiting), None)
        if first is None:
            return 0.0
        num_prompts = len(prefills) + min(len(self._waiting), self._max_running - len(self._running))
        return min(num_prompts, budget / (first.num_tokens - first.num_computed_tokens))

    def _admit(self, head: Sequence, batch: Batch) -> bool:
        """Moves the first of the queue among the running if there is room for it."""
        num_reserved = len(self._running)  # a block for each to grow by, lest the newcomer be preempted at once
        # Of one in flight, preempted since, the id that it has been sampled is still to come.
        if head.num_in_flight or self._ledger.num_available <= num_reserved:
            return False
        prefix = self._ledger.cached_prefix(head)
        if not self._ledger.can_allocate(head, prefix, num_reserved):
            return False
        del self._waiting[0]
        if (copy := self._ledger.allocate(head, prefix)) is not None:
            batch.copies.append(copy)
        head.state = SequenceState.RUNNING
        _insert(self._running, head)
        if head.cached_prompt_tokens is None:
            head.cached_prompt_tokens = min(head.num_computed_tokens, head.num_prompt_tokens)
            self._counts["num_prompt_tokens"] += head.num_prompt_tokens
            self._counts["num_cached_prompt_tokens"] += head.cached_prompt_tokens
        return True

    def _end(self, sequence: Sequence) -> None:
        del self._sequences[sequence.key]
        (self._waiting if sequence.state is SequenceState.WAITING else self._running).remove(sequence)
        sequence.state = SequenceState.FINISHED
        self._ledger.free(sequence)


def _insert(sequences: list[Sequence], sequence: Sequence) -> None:
    insort(sequences, sequence, key=_RANK)
