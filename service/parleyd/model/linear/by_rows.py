"""A linear layer in two kinds, one that reads less and one that computes faster, and the choice by measured cost."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from parleyd.model.linear.plain import Linear

_WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_NUM_TRIALS = 3
# For one shape; enough for tens of rows on a quiet machine.
_MAX_SECONDS = 0.1
# A shape is measured on as many layers as have about this many weights, so that they come from memory as in a step.
_MEASURED_WEIGHTS = 12_000_000
# The wide kind stays where the narrow one gains less, as that is no more than noise.
_MIN_GAIN = 0.05


class ByRows:
    """`narrow` for up to `max_narrow_rows` rows, `wide` for more. `shape`: `[out, in]`."""

    def __init__(self, narrow: Linear, wide: Linear, shape: tuple[int, int]) -> None:
        self.shape = shape
        self.max_narrow_rows = 0
        self.narrow = narrow
        self.wide = wide

    def __call__(self, x: Tensor) -> Tensor:
        return (self.narrow if x.shape[0] <= self.max_narrow_rows else self.wide)(x)


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
    """The most rows for which the narrow kind is faster, and for all fewer too; 0 where it never is."""
    widest, deadline = 0, time.perf_counter() + _MAX_SECONDS
    for rows in _WIDTHS:
        if time.perf_counter() > deadline:
            break
        x = torch.ones(rows, group[0].shape[1], dtype=dtype)
        narrow, wide = [layer.narrow for layer in group], [layer.wide for layer in group]
        costs = [(_cost(narrow, x), _cost(wide, x)) for _ in range(_NUM_TRIALS)]
        if min(cost for cost, _ in costs) > (1 - _MIN_GAIN) * min(cost for _, cost in costs):
            break
        widest = rows
    return widest


def _cost(linears: Sequence[Linear], x: Tensor) -> float:
    started = time.perf_counter()
    for linear in linears:
        linear(x)
    return time.perf_counter() - started
