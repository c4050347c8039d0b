"""A linear layer in two kinds, one that reads less and one that computes faster, and the choice by measured cost."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor

from parleyd.model.linear.plain import Linear

_WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_MIN_TRIALS, _MAX_TRIALS = 2, 16
# For one shape and width.
_MAX_SECONDS = 0.02
# A shape is measured on as many layers as have about this many weights, so that they come from memory as in a step.
_MEASURED_WEIGHTS = 12_000_000
# The wide kind stays where the narrow one gains less, as that is no more than noise.
_MIN_GAIN = 0.05


class ByRows:
    """`narrow` for up to `max_narrow_rows` rows, `wide` for more. `shape`: `[out, in]`; `limit`: never more rows."""

    def __init__(self, narrow: Linear, wide: Linear, shape: tuple[int, int], limit: int = _WIDTHS[-1]) -> None:
        self.shape = shape
        self.limit = limit
        self.max_narrow_rows = 0
        self.narrow = narrow
        self.wide = wide

    def __call__(self, x: Tensor) -> Tensor:
        return (self.narrow if self.takes_narrow(x.shape[0]) else self.wide)(x)

    def takes_narrow(self, num_rows: int) -> bool:
        return num_rows <= self.max_narrow_rows


@torch.inference_mode()
def choose_by_cost(layers: Sequence[ByRows], dtype: torch.dtype) -> dict[tuple[int, int], int]:
    """Sets `max_narrow_rows` of each layer, and returns it by shape. Takes a fraction of a second: call it once."""
    limits = {}
    for shape in dict.fromkeys(layer.shape for layer in layers):
        group = [layer for layer in layers if layer.shape == shape]
        num_measured = max(1, _MEASURED_WEIGHTS // (shape[0] * shape[1]))
        limits[shape] = _widest_gain(group[:num_measured], dtype)
        for layer in group:
            layer.max_narrow_rows = limits[shape]
    return limits


def _widest_gain(group: Sequence[ByRows], dtype: torch.dtype) -> int:
    """The most rows for which the narrow kind is faster, 0 where it never is.

    Each further row costs the narrow kind more than the wide one, so few widths need be measured, and those well.
    """
    widths = [width for width in _WIDTHS if width <= group[0].limit]
    num_narrow = bisect_left(widths, True, key=lambda rows: not _gains(group, rows, dtype))
    return widths[num_narrow - 1] if num_narrow else 0


def _gains(group: Sequence[ByRows], rows: int, dtype: torch.dtype) -> bool:
    """By the fastest of trials in turns: other work on the machine only ever adds to what one takes."""
    x = torch.ones(rows, group[0].shape[1], dtype=dtype)
    narrow, wide = [layer.narrow for layer in group], [layer.wide for layer in group]
    costs: list[tuple[float, float]] = []
    deadline = time.perf_counter() + _MAX_SECONDS
    while len(costs) < _MIN_TRIALS or (len(costs) < _MAX_TRIALS and time.perf_counter() < deadline):
        costs.append((_cost(narrow, x), _cost(wide, x)))
    return min(cost for cost, _ in costs) < (1 - _MIN_GAIN) * min(cost for _, cost in costs)


def _cost(linears: Sequence[Linear], x: Tensor) -> float:
    started = time.perf_counter()
    for linear in linears:
        linear(x)
    return time.perf_counter() - started
