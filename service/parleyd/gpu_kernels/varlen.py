"""Paged attention by `torch.nn.attention.varlen.varlen_attn` (FlashAttention), for prompts and for decoding alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def varlen_kernels() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """A DecodeKernel and a PrefillKernel.

    For float16 and bfloat16, in a torch whose varlen_attn knows block tables: another fails when it is tried. One
    split, so that what a sequence is given does not depend on the others' lengths.
    """
    from torch.nn.attention.varlen import varlen_attn

    def prefill(
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        table: Tensor,
        lengths: Tensor,
        starts: Tensor,
        max_tokens: int,
        scale: float,
    ) -> Tensor:
        attended = varlen_attn(
            query,
            keys.transpose(1, 2),
            values.transpose(1, 2),
            starts,
            None,
            max_tokens,
            table.shape[1] * keys.shape[2],
            scale=scale,
            window_size=(-1, 0),
            enable_gqa=query.shape[1] != keys.shape[1],
            seqused_k=lengths,
            block_table=table,
            num_splits=1,
        )
        assert isinstance(attended, Tensor)
        return attended

    def decode(query: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, scale: float) -> Tensor:
        starts = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device)
        return prefill(query, keys, values, table, lengths, starts, 1, scale)

    return decode, prefill
