"""Changes to single logits: penalties on ids that have been used, biases, ids masked until enough are generated.

Called by the sampler. What it keeps of a request grows with the distinct ids used, not with the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parleyd.model.upload import upload

# Rows get room for so many ids to come, so that tables are not made anew at each step.
_SPARE_COLUMNS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalties:
    """One request's changes to its logits."""

    repetition: float
    presence: float
    frequency: float
    bias: Mapping[int, float]
    masked_ids: frozenset[int]  # until `min_new_tokens` are generated
    min_new_tokens: int

    @property
    def look_back(self) -> bool:
        """Whether they depend on the ids so far."""
        return self.repetition != 1.0 or self.presence != 0.0 or self.frequency != 0.0

    def change_logits(self, position: int) -> bool:
        """Whether they do anything from generated token `position` on."""
        return self.look_back or bool(self.bias) or (position < self.min_new_tokens and bool(self.masked_ids))


class PenalisedRow(NamedTuple):
    """A row of the batch whose logits change. `token_ids` may lack the latest of the `position` generated ids."""

    row: int
    key: int
    penalties: Penalties
    token_ids: Sequence[int]
    num_prompt_tokens: int
    position: int


class _Columns(NamedTuple):
    """What is known of ids, each [rows, columns]. An id may stand in several columns of a row, all saying the same.

    So a column without use repeats another, and writing a logit back from each of its columns is well defined.
    """

    ids: Tensor  # int64
    num_generated: Tensor  # float32: how often it has been
    biases: Tensor  # float32
    used: Tensor  # bool: it is in the prompt or has been generated
    masked: Tensor  # bool

    def select(self, rows: Tensor) -> _Columns:
        return _Columns(*(column.index_select(0, rows) for column in self))

    def fit(self, num_columns: int) -> _Columns:
        num_more = num_columns - self.ids.shape[1]
        if num_more <= 0:
            return _Columns(*(column[:, :num_columns] for column in self))
        return _Columns(*(torch.cat((column, column[:, :1].expand(-1, num_more)), 1) for column in self))


class PenaltyTable:
    """The changes to the logits of a batch, kept on the device from step to step.

    Ids are recorded where they were sampled, so that the next step need not wait until the host has them.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._slots: dict[int, int] = {}  # by key: its row here
        self._positions: list[int] = []
        self._widths: list[int] = []
        self._look_back = False
        self._columns: _Columns

    def is_at(self, rows: Sequence[PenalisedRow]) -> bool:
        """Whether the table is of these rows, in their order and at their positions."""
        return list(self._slots) == [row.key for row in rows] and self._positions == [row.position for row in rows]

    def update(self, rows: Sequence[PenalisedRow]) -> None:
        """Makes this the table of these rows. Those known from the step before are kept, the others read their ids.

        Raises ValueError where a row that is new here lacks ids.
        """
        slots = [self._slots.get(row.key) for row in rows]
        old = [slot if slot is not None and self._positions[slot] == row.position else None
               for slot, row in zip(slots, rows, strict=True)]  # fmt: skip
        parts: list[_Columns] = []
        widths = [0] * len(rows)
        kept = [index for index, slot in enumerate(old) if slot is not None]
        fresh = [index for index, slot in enumerate(old) if slot is None]
        if kept:
            kept_slots = [slot for slot in old if slot is not None]
            parts.append(self._columns.select(self._upload(np.array(kept_slots))))
            for index, slot in zip(kept, kept_slots, strict=True):
                widths[index] = self._widths[slot]
        if fresh:
            columns = [self._read(rows[index]) for index in fresh]
            for index, column in zip(fresh, columns, strict=True):
                widths[index] = len(column[0])
            parts.append(self._pack(columns))
        order = sorted(range(len(rows)), key=(kept + fresh).__getitem__)
        num_columns = max(widths, default=0) + _SPARE_COLUMNS
        if rows:
            fitted = [part.fit(num_columns) for part in parts]
            joined = _Columns(*(torch.cat(column) for column in zip(*fitted, strict=True)))
            self._columns = joined.select(self._upload(np.array(order)))
        self._widths = widths
        self._set_rows(rows)

    def _set_rows(self, rows: Sequence[PenalisedRow]) -> None:
        self._slots = {row.key: slot for slot, row in enumerate(rows)}
        self._positions = [row.position for row in rows]
        penalties = [row.penalties for row in rows]
        self._look_back = any(one.look_back for one in penalties)
        numbers = np.array([(one.repetition, one.presence, one.frequency) for one in penalties], np.float32)
        self._repetition, self._presence, self._frequency = self._upload(numbers.reshape(-1, 3).T)[:, :, None]
        integers = np.array(
            [(row.row, width, row.penalties.min_new_tokens - row.position)
             for row, width in zip(rows, self._widths, strict=True)], np.int64,
        )  # fmt: skip
        self._rows, self._ends, self._num_masked_steps = self._upload(integers.reshape(-1, 3).T)

    def apply(self, logits: Tensor) -> None:
        """Changes the logits in place, in transformers' order: biases, repetition, mask.

        Presence and frequency penalties, which it lacks, come last, where its `generate` puts a caller's processors.
        """
        columns = self._columns.fit(max(self._widths))
        flat = columns.ids + self._rows[:, None] * self._vocab_size
        x = logits.view(-1)[flat] + columns.biases
        x = torch.where(columns.used, torch.where(x < 0, x * self._repetition, x / self._repetition), x)
        x.masked_fill_(columns.masked & (self._num_masked_steps[:, None] > 0), -math.inf)
        x -= self._presence * (columns.num_generated > 0)
        x -= self._frequency * columns.num_generated
        logits.view(-1)[flat] = x

    def record(self, token_ids: Tensor) -> None:
        """Takes the ids sampled for the whole batch: [batch]."""
        self._positions = [position + 1 for position in self._positions]
        self._num_masked_steps -= 1
        if not self._look_back:
            return
        new = token_ids.index_select(0, self._rows)[:, None]
        columns = self._columns
        same = columns.ids == new
        columns.num_generated.add_(same)
        columns.used.logical_or_(same)
        known, column = same.max(-1, keepdim=True)
        end = self._ends[:, None]
        columns.ids.scatter_(1, end, new)
        columns.num_generated.scatter_(1, end, columns.num_generated.gather(1, column).masked_fill_(~known, 1.0))
        columns.biases.scatter_(1, end, columns.biases.gather(1, column).masked_fill_(~known, 0.0))
        columns.masked.scatter_(1, end, columns.masked.gather(1, column) & known)
        columns.used.scatter_(1, end, True)
        self._ends += 1
        self._widths = [width + 1 for width in self._widths]
        if max(self._widths) == columns.ids.shape[1]:
            self._columns = columns.fit(2 * columns.ids.shape[1])

    def _read(self, row: PenalisedRow) -> tuple[NDArray[Any], ...]:
        """A row's columns from its ids on the host; at least one, for the columns without use to repeat."""
        end = row.num_prompt_tokens + row.position
        history = np.array(row.token_ids, np.int64)[:end]
        if len(history) < end:
            raise ValueError(f"row {row.key} at position {row.position} needs all ids before it")
        if not row.penalties.look_back:
            history, end = history[:0], 0
        history = history[history < self._vocab_size]
        generated = np.array(row.token_ids[row.num_prompt_tokens : end], np.int64)
        generated = generated[generated < self._vocab_size]
        bias, masked = row.penalties.bias, sorted(row.penalties.masked_ids)
        ids = np.unique(np.concatenate((history, np.array([*bias, *masked], np.int64))))
        ids = ids if len(ids) else np.zeros(1, np.int64)
        counts = np.zeros(len(ids), np.float32)
        np.add.at(counts, np.searchsorted(ids, generated), 1.0)
        biases = np.zeros(len(ids), np.float32)
        biases[np.searchsorted(ids, np.array([*bias], np.int64))] = [*bias.values()]
        return ids, counts, biases, np.isin(ids, history), np.isin(ids, masked)

    def _pack(self, rows: Sequence[tuple[NDArray[Any], ...]]) -> _Columns:
        width = max(len(ids) for ids, *_ in rows)
        packed = []
        for columns in zip(*rows, strict=True):
            padded = [np.pad(column, (0, width - len(column)), constant_values=column[0]) for column in columns]
            packed.append(self._upload(np.stack(padded)))
        return _Columns(*packed)

    def _upload(self, array: NDArray[Any]) -> Tensor:
        return upload(array, self._device)
