"""Makes a model's linear layers, fused and in the fastest kinds that are wanted and to be had."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from parleyd.model.gguf_blocks import GgufBlocks, concatenated
from parleyd.model.linear.by_rows import ByRows, choose_by_cost
from parleyd.model.linear.compiled import (
    MAX_BLOCK_ROWS,
    CompiledLinear,
    are_blocks_fastest,
    can_compile,
    can_compile_blocks,
    compiled_block_linear,
    compiled_linear,
)
from parleyd.model.linear.four_bit import can_use_four_bits, four_bit_linear
from parleyd.model.linear.packed import can_pack, packed_linear
from parleyd.model.linear.plain import Linear, plain_linear
from parleyd.model.linear.widened import can_widen, widened_linear

_logger = logging.getLogger("parleyd.model")


class LinearMaker:
    """Takes them out of `weights`, lest they be held twice.

    `packed`: lay weights out for this CPU, or widen them where it has no use for that. `blocks`: also use the numbers
    that the weights came from. `compiled`: with the products of `parleyd.cpu_kernels`, where this processor has the
    instructions.
    """

    def __init__(
        self, weights: dict[str, Tensor], *, packed: bool, blocks: GgufBlocks | None, compiled: bool = False
    ) -> None:
        self._weights = weights
        self._packed = packed
        self._blocks = blocks
        self._compiled = compiled
        self._by_rows: list[ByRows] = []

    def make(self, *names: str) -> Linear:
        """The layers of one input with these weights, `[out, in]`, as one."""
        weight = _joined([self._weights.pop(name) for name in names])
        biases = [name.removesuffix("weight") + "bias" for name in names]
        bias = _joined([self._weights.pop(name) for name in biases]) if biases[0] in self._weights else None
        narrow = self._narrow(weight, bias, names)
        if isinstance(narrow, CompiledLinear) and are_blocks_fastest():
            return narrow
        if narrow is None:
            return self._wide(weight, bias)
        wide, shape = self._wide(weight, bias), (weight.shape[0], weight.shape[1])
        are_compiled = isinstance(narrow, CompiledLinear) and isinstance(wide, CompiledLinear)
        by_rows = ByRows(narrow, wide, shape, MAX_BLOCK_ROWS) if are_compiled else ByRows(narrow, wide, shape)
        self._by_rows.append(by_rows)
        return by_rows

    def choose(self) -> None:
        """Decides between the kinds, by what they cost here; to be called once all are made."""
        if not self._by_rows:
            return
        limits = choose_by_cost(self._by_rows, torch.bfloat16)
        shown = ", ".join(f"{rows} ({outs} x {ins})" for (outs, ins), rows in limits.items())
        _logger.info("weights as in the .gguf file for steps of up to this many rows, bfloat16 above: %s", shown)

    def _wide(self, weight: Tensor, bias: Tensor | None) -> Linear:
        if self._packed and self._compiled and can_compile(weight):
            return compiled_linear(weight, bias)
        if self._packed and can_pack(weight):
            return packed_linear(weight, bias)
        return (widened_linear if self._packed and can_widen(weight) else plain_linear)(weight, bias)

    def _narrow(self, weight: Tensor, bias: Tensor | None, names: tuple[str, ...]) -> Linear | None:
        """With the file's own numbers; None where it has none of these weights, or there is no kernel for them."""
        if self._blocks is None:
            return None
        numbers = concatenated([self._blocks.numbers_of(name, weight.shape[1]) for name in names])
        if numbers is None:
            return None
        if self._compiled and can_compile_blocks(weight):
            return compiled_block_linear(numbers, bias)
        return four_bit_linear(numbers, bias) if can_use_four_bits(weight) else None


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]
