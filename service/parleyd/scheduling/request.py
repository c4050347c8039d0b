"""A request inside the batching engine, and the part of several that one step runs.

The scheduler owns them; the model runner and the sampler only read.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, Protocol

from parleyd.generation import EngineRequest, FinishReason


class SequenceState(Enum):
    """Where a sequence is: in the queue, holding KV blocks, or over (answered or aborted)."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Grammar(Protocol):
    """Where a sequence is in the grammar that its text must follow; see grammar/state.py."""

    @property
    def error(self) -> str | None:
        """Why it cannot be followed any further."""

    def advance(self, token_id: int) -> None:
        """Takes the sequence's next id, unless it is one that ends the sequence."""


class Sequence:
    """One request's state, from `submit` to its last token.

    Ids are int32 arrays: an eighth of a list's memory, invisible to the garbage collector, and copied into a tensor at
    memory speed. Copy them, never keep a view: an array that is being viewed cannot grow.
    """

    def __init__(
        self,
        request: EngineRequest,
        arrival: int,
        eos_token_ids: frozenset[int],
        max_context_tokens: int,
        grammar: Grammar | None = None,
    ) -> None:
        """A waiting sequence; one with a `finish_reason` where the ids already delivered leave nothing to generate."""
        self.key = request.key
        self.token_ids = array("i", request.prompt_ids + request.output_ids)  # prompt and output
        self.num_prompt_tokens = len(request.prompt_ids)
        self.params = params = request.params
        # Nothing can follow the end of a grammar.
        ignores_eos = params.ignore_eos and not params.grammar
        self.stop_token_ids = frozenset(params.stop_token_ids) | (frozenset() if ignores_eos else eos_token_ids)
        # Of prompt and output together.
        self.max_length = min(self.num_prompt_tokens + params.max_new_tokens, max_context_tokens)
        self.rank = (-request.priority, arrival)  # the smaller, the sooner it is served and the later it is preempted
        self.cache_salt = request.cache_salt
        self.grammar = grammar

        self.state = SequenceState.WAITING
        self.block_ids = array("i")
        self.block_hashes: list[bytes] = []  # of its leading full blocks, as far as anyone has asked
        self.num_computed_tokens = 0  # whose keys and values are in the cache once every batch scheduled so far has run
        self.num_in_flight = 0  # batches scheduled and not yet committed
        self.num_pending = 0  # ids that those batches will sample
        self.cached_prompt_tokens: int | None = None  # found in the prefix cache when first admitted
        self.finish_reason: FinishReason | None = None
        if not self.stop_token_ids.isdisjoint(request.output_ids):
            self.finish_reason = FinishReason.STOP
        elif len(self.token_ids) >= self.max_length:
            self.finish_reason = FinishReason.LENGTH

    @property
    def num_tokens(self) -> int:
        """Prompt and output, with the ids that are being sampled right now."""
        return len(self.token_ids) + self.num_pending

    def append(self, token_id: int) -> None:
        """Takes a sampled id, which may finish the sequence."""
        self.token_ids.append(token_id)
        self.num_pending -= 1
        if token_id in self.stop_token_ids:
            self.finish_reason = FinishReason.STOP
        elif len(self.token_ids) >= self.max_length:
            self.finish_reason = FinishReason.LENGTH
        elif self.grammar is not None:
            self.grammar.advance(token_id)


class Scheduled(NamedTuple):
    """The stretch of one sequence that a step runs: the `num_tokens` positions from `start`."""

    sequence: Sequence
    block_ids: array[int]  # still those of this step if the sequence is aborted or preempted before it has run
    start: int
    num_tokens: int
    samples: bool  # the stretch reaches the sequence's end, so its last logits give the next id
    awaits_id: bool  # its one input id is being sampled by the batch before, and not known here yet


class BlockCopy(NamedTuple):
    """The first `num_tokens` of a block that another is to begin with, and zeros behind."""

    source: int
    target: int
    num_tokens: int


@dataclass(slots=True)
class Batch:
    """What one step runs: decodes first, then stretches of prompts.

    A stretch attends to all before it in its blocks, its own tokens included: in each layer, write first, then attend.
    Before all that, blocks are copied, in order: `copies`, and then `begun_blocks`.
    """

    scheduled: list[Scheduled] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    num_tokens: int = 0
    num_decodes: int = 0  # the leading entries, of one token each
    num_samples: int = 0

    def add(self, sequence: Sequence, num_tokens: int) -> None:
        """Schedules the next `num_tokens` of a sequence."""
        start = sequence.num_computed_tokens
        num_pending = sequence.num_pending
        samples = start + num_tokens == len(sequence.token_ids) + num_pending
        self.scheduled.append(Scheduled(sequence, sequence.block_ids, start, num_tokens, samples, num_pending > 0))
        self.num_tokens += num_tokens
        sequence.num_computed_tokens = start + num_tokens
        sequence.num_in_flight += 1
        if samples:
            self.num_samples += 1
            sequence.num_pending += 1

    def begun_blocks(self, block_size: int) -> list[BlockCopy]:
        """Copies of nothing into those that a stretch is the first to write to, and does not fill.

        So they are cleared: behind its last token a mask hides what is there, which must be finite.
        """
        ends = [item.start + item.num_tokens for item in self.scheduled]
        return [
            BlockCopy(0, item.block_ids[end // block_size], 0)
            for item, end in zip(self.scheduled, ends, strict=True)
            if 0 < end % block_size <= item.num_tokens
        ]

    def token_ids(self) -> array[int]:
        """Input ids of all stretches, end to end (int32); 0 for an id that is awaited."""
        ids = array("i")
        for item in self.scheduled:
            if item.awaits_id:
                ids.append(0)
            else:
                ids.extend(item.sequence.token_ids[item.start : item.start + item.num_tokens])
        return ids

    def positions(self) -> array[int]:
        """The position of each input id in its sequence (int64)."""
        positions = array("q")
        for item in self.scheduled:
            positions.extend(range(item.start, item.start + item.num_tokens))
        return positions
