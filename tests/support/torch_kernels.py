"""Attention kernels in plain torch, sequence by sequence: what the fast ones are held against, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from parleyd.kernels.paged import Kernels


def decode(query: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """See DecodeKernel."""
    starts = torch.arange(len(query) + 1, dtype=torch.int32)
    return prefill(query, keys, values, table, lengths, starts, 1, scale)


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
    """See PrefillKernel."""
    outputs = []
    for row, length in enumerate(lengths.tolist()):
        own = query[int(starts[row]) : int(starts[row + 1])]
        assert 0 < len(own) <= max_tokens
        blocks = table[row, : -(-length // keys.shape[2])].long()
        key, value = (one[blocks].transpose(0, 1).flatten(1, 2)[:, :length] for one in (keys, values))
        mask = torch.ones(len(own), length, dtype=torch.bool, device=query.device).tril(length - len(own))
        outputs.append(
            F.scaled_dot_product_attention(
                own.transpose(0, 1), key, value, attn_mask=mask, scale=scale, enable_gqa=len(key) != query.shape[1]
            ).transpose(0, 1)
        )
    return torch.cat(outputs)


KERNELS = Kernels(decode, prefill)
