"""Makes a model's linear layers, fused and in the fastest kinds that are wanted and to be had."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from parleyd.model.gguf_blocks import GgufBlocks, Numbers, concatenated
from parleyd.model.linear.by_rows import ByRows, choose_by_cost
from parleyd.model.linear.four_bit import can_use_four_bits, four_bit_linear
from parleyd.model.linear.packed import can_pack, packed_linear
from parleyd.model.linear.plain import Linear, plain_linear

_logger = logging.getLogger("parleyd.model")


class LinearMaker:
    """`packed`: lay weights out for this CPU. `blocks`: also use the 4-bit numbers that the weights came from."""

    def __init__(self, *, packed: bool, blocks: GgufBlocks | None) -> None:
        self._packed = packed
        self._blocks = blocks
        self._by_rows: list[ByRows] = []

    def make(self, *modules: Any, keep: bool = False) -> Linear:
        """Linear modules of one input as one. Unless `keep`, they let their weights go, lest those be held twice."""
        weight = torch.cat([module.weight.detach() for module in modules]) if len(modules) > 1 else modules[0].weight
        bias = None if modules[0].bias is None else torch.cat([module.bias.detach() for module in modules])
        numbers = self._numbers(weight, modules)
        if not keep:
            for module in modules:
                module.weight = module.bias = None
        pack = self._packed and can_pack(weight)
        wide = packed_linear(weight.detach(), bias) if pack else plain_linear(weight.detach(), bias)
        if numbers is None:
            return wide
        by_rows = ByRows(four_bit_linear(numbers, bias), wide, (weight.shape[0], weight.shape[1]))
        self._by_rows.append(by_rows)
        return by_rows

    def choose(self) -> None:
        """Decides between the kinds, by what they cost here; to be called once all are made."""
        if not self._by_rows:
            return
        limits = choose_by_cost(self._by_rows, torch.bfloat16)
        shown = ", ".join(f"{rows} ({outs} x {ins})" for (outs, ins), rows in limits.items())
        _logger.info("4-bit weights as in the .gguf file for steps of up to this many rows, bfloat16 above: %s", shown)

    def _numbers(self, weight: Tensor, modules: tuple[Any, ...]) -> Numbers | None:
        if self._blocks is None or not can_use_four_bits(weight):
            return None
        return concatenated([self._blocks.numbers_of(module.weight) for module in modules])
