"""A device that finds out any lost, doubled or misplaced token, and any slot read in error."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from parleyd.scheduling.request import Batch, BlockCopy, Sequence, SequenceState
from tests.unit.scheduling.token_model import EOS, before_the_first, key_value, next_token


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
        ids, positions = list(batch.token_ids()), list(batch.positions())
        slots = [self._slot(item.block_ids, item.start + i) for item in batch.scheduled for i in range(item.num_tokens)]
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
        self._copy(step.batch.copies + step.batch.begun_blocks(self._block_size))
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

    def _copy(self, copies: list[BlockCopy]) -> None:
        for source, target, num_tokens in copies:
            for i in range(self._block_size):
                read = self._memory[source * self._block_size + i] if i < num_tokens else -1
                self._memory[target * self._block_size + i] = read

    def _slot(self, block_ids: array[int], position: int) -> int:
        return block_ids[position // self._block_size] * self._block_size + position % self._block_size

    def _true_key_values(self, sequence: Sequence, length: int) -> list[int]:
        truth = self._truth.setdefault(sequence, [])
        for token_id in sequence.token_ids[len(truth) :]:
            truth.append(key_value(truth[-1] if truth else before_the_first(sequence.cache_salt), token_id))
        return truth[:length]
