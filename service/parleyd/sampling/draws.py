"""The random numbers of sampling, and drawing a token with one: truncation to the likeliest, then inverse CDF.

Called by the sampler. A row's result depends on that row alone: elementwise operations and softmax, which computes each
row by itself, in float32; sums in float64, where their order cannot tell. Masks are float32 ones made in place
(`x.clone().ge_(y)`): on a CPU, operations on bool tensors are not vectorised and take ten times as long.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MASK64 = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

# Rows are summed in blocks of so many columns; a narrow choice of block then replaces a walk over the vocabulary.
_BLOCK_SIZE = 128
# The nucleus of most steps lies within so many tokens. Those of the others are looked for in all.
_NUM_NUCLEUS_CANDIDATES = 256


def stream_key(seed: int, choice: int) -> int:
    """Where the random numbers of (seed, choice) start; both are mixed, so that neighbours have unrelated streams."""
    return _mix(_mix((seed + _GAMMA) & _MASK64) + (choice + 1) * _GAMMA & _MASK64)


def _mix(z: int) -> int:
    z = (z ^ (z >> 30)) * _MIX_1 & _MASK64
    z = (z ^ (z >> 27)) * _MIX_2 & _MASK64
    return z ^ (z >> 31)


def uniform(key: int, position: int) -> float:
    """In [0, 1), of 53 bits: number `position` of the stream that starts at `key`.

    SplitMix64 (Steele, Lea, Flood 2014), whose n-th number needs no n - 1 before it.
    """
    return (_mix(key + (position + 1) * _GAMMA & _MASK64) >> 11) * 2.0**-53


def first_argmax(x: Tensor) -> Tensor:
    """[rows]: the lowest id of each row's maximum. x: [rows, vocab]. A tenth of the time of torch.argmax on a CPU."""
    blocks = _blocks(x, -math.inf)
    block = blocks.amax(-1).argmax(-1, keepdim=True)
    return block.squeeze(1) * blocks.shape[2] + _pick_block(blocks, block).argmax(-1)


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """[rows]: the first id at which the cumulated probability passes `uniform` times its total.

    probs: [rows, vocab], float32, of any total; an id of probability 0 is never drawn. uniform: [rows], float64.
    """
    blocks = _blocks(probs, 0.0)
    cumulated = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniform[:, None] * cumulated[:, -1:]
    block = (cumulated <= target).sum(-1, keepdim=True).clamp_(max=blocks.shape[1] - 1)
    before = cumulated.gather(1, (block - 1).clamp_(min=0)).masked_fill_(block == 0, 0.0)
    inner = _pick_block(blocks, block).cumsum(-1, dtype=torch.float64)
    offset = (inner <= target - before).sum(-1)
    # Rounding can leave a target just past the block's end: then it is the block's last id of any probability.
    last = (inner < inner[:, -1:]).sum(-1)
    return block.squeeze(1) * blocks.shape[2] + torch.minimum(offset, last)


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[rows, k] values in falling order, and their ids. Which of equal values comes first is open.

    The k largest are in the k blocks of the largest maxima, which on a CPU are found sooner.
    """
    num_rows, width = x.shape
    size = next((size for size in (64, 32, 8) if width % size == 0 and k * size * 4 <= width), 0)
    if x.is_cuda or not size:
        return x.topk(k)
    blocks = x.view(num_rows, -1, size)
    chosen = blocks.amax(-1).topk(k, sorted=False).indices
    values, places = largest(blocks[torch.arange(num_rows)[:, None], chosen].flatten(1), k)
    return values, chosen.gather(1, places // size) * size + places % size


def keep_top_p(probs: Tensor, top_p: Tensor) -> Tensor:
    """probs, with 0 for all but the likeliest ids that together reach `top_p` of the total; in place, without a sort.

    Of equal ones at the edge the lowest ids are kept. probs: [rows, vocab], float32; top_p: [rows, 1], float64; 1.0
    keeps all.
    """
    limit = torch.where(top_p < 1.0, top_p * _mass_above(probs, -1.0), math.inf)
    floor = (_bisect if probs.is_cuda else _search)(probs, limit)
    num_ties = ((limit - _mass_above(probs, floor)) / floor).ceil_().clamp_(min=1.0)
    ties = probs.clone().eq_(floor)
    # On CUDA, where looking would wait for the device, it is taken that there are too many.
    if probs.is_cuda or bool((num_ties < ties.sum(-1, keepdim=True)).any()):
        probs.masked_fill_(ties.cumsum(-1).mul_(ties) > num_ties, 0.0)
    return probs.mul_(probs.clone().ge_(floor))


def _search(probs: Tensor, limit: Tensor) -> Tensor:
    """[rows, 1]: the lowest probability above which there is less than `limit` ([rows, 1]); 0 where there is in all."""
    values, _ = largest(probs, min(_NUM_NUCLEUS_CANDIDATES, probs.shape[1]))
    cumulated = values.cumsum(-1, dtype=torch.float64)
    num_kept = (cumulated - values < limit).sum(-1, keepdim=True).clamp_(min=1)
    floor = values.gather(1, num_kept - 1)
    for row in ((cumulated[:, -1:] < limit) & (limit < math.inf)).nonzero()[:, 0].tolist():
        floor[row] = _wide_floor(probs[row].numpy(), float(limit[row]))
    return floor.masked_fill_(limit == math.inf, 0.0)


def _wide_floor(probs: NDArray[np.float32], limit: float) -> float:
    """The same in all of a row, `[vocab]`: by the masses of bins first, so that few numbers are sorted."""
    bins = probs.view(np.int32) >> 15  # those of one share their exponent and eight bits of their fraction
    mass = np.bincount(bins, probs)[::-1].cumsum()
    # Summed in another order, all of it may lie below the limit by its last bits.
    place = int(mass.searchsorted(min(limit, mass[-1])))
    above = mass[place - 1] if place else 0.0
    values = -np.sort(-probs[bins == len(mass) - 1 - place])
    num_kept = int((above + values.cumsum(dtype=np.float64) - values < limit).sum())
    return float(values[max(num_kept, 1) - 1])


def _bisect(probs: Tensor, limit: Tensor) -> Tensor:
    """As `_search`, by bisection over the bits of float32 numbers, which as integers have the same order above 0.

    It asks nothing of the host, and 31 passes take less than a sort of a whole vocabulary.
    """
    high = probs.amax(-1, keepdim=True).view(torch.int32)
    low = torch.zeros_like(high)
    for _ in range(31):
        middle = (low + high) >> 1
        is_above = _mass_above(probs, middle.view(torch.float32)) < limit
        high, low = torch.where(is_above, middle, high), torch.where(is_above, low, middle)
    return high.view(torch.float32)


def _mass_above(probs: Tensor, floor: Tensor | float) -> Tensor:
    """[rows, 1], float64."""
    return _blocks(probs.clone().gt_(floor).mul_(probs), 0.0).sum(-1, dtype=torch.float64).sum(-1, keepdim=True)


def _blocks(x: Tensor, padding: float) -> Tensor:
    """[rows, blocks, block size]."""
    if x.shape[1] % _BLOCK_SIZE:
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % _BLOCK_SIZE), value=padding)
    return x.view(x.shape[0], -1, _BLOCK_SIZE)


def _pick_block(blocks: Tensor, block: Tensor) -> Tensor:
    """[rows, block size]: one block of each row. block: [rows, 1]."""
    return blocks.gather(1, block[:, :, None].expand(-1, -1, blocks.shape[2])).squeeze(1)
