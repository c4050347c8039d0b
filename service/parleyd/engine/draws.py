"""The random numbers of sampling, and drawing a token with one: truncation to the likeliest, then inverse CDF.

Called by the sampler. A row's result depends on that row alone: elementwise operations and softmax, which computes each
row by itself, in float32; sums in float64, where their order cannot tell.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MASK64 = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

# Rows are summed in blocks of so many columns; a narrow choice of block then replaces a walk over the vocabulary.
_BLOCK_SIZES = (128, 64, 32)
# The nucleus of most steps lies within so many tokens. Where it does not, it is found by bisection.
_NUM_NUCLEUS_CANDIDATES = 256


def stream_key(seed: int, choice: int) -> int:
    """Where the random numbers of (seed, choice) start; both are mixed, so that neighbours have unrelated streams."""
    return _mix(_mix((seed + _GAMMA) & _MASK64) + (choice + 1) * _GAMMA & _MASK64)


def _mix(z: int) -> int:
    z = (z ^ (z >> 30)) * _MIX_1 & _MASK64
    z = (z ^ (z >> 27)) * _MIX_2 & _MASK64
    return z ^ (z >> 31)


def uniforms(keys: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """[rows] numbers in [0, 1), of 53 bits: number `position` of each stream.

    SplitMix64 (Steele, Lea, Flood 2014), whose n-th number needs no n - 1 before it.
    """
    z = keys + (positions + np.uint64(1)) * np.uint64(_GAMMA)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
    z ^= z >> np.uint64(31)
    numbers: NDArray[np.float64] = (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


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
    width = x.shape[1]
    size = 64 if k <= 64 else 32
    if x.is_cuda or width % size or k * size * 4 > width:
        return x.topk(k)
    blocks = x.view(x.shape[0], -1, size)
    chosen = blocks.amax(-1).topk(k, sorted=False).indices[:, :, None]
    values, order = blocks.gather(1, chosen.expand(-1, -1, size)).flatten(1).topk(k)
    ids = chosen * size + torch.arange(size, device=x.device)
    return values, ids.flatten(1).gather(1, order)


class Cut(NamedTuple):
    """What truncation keeps of a row: the logits above `floor`, and of those equal to it the `num_ties` lowest ids."""

    floor: Tensor  # [rows, 1]
    num_ties: Tensor | None  # [rows, 1], float64; None: all

    def apply(self, logits: Tensor, probs: Tensor) -> Tensor:
        """probs [rows, vocab], with 0 for what is not kept; in place."""
        probs.masked_fill_(logits < self.floor, 0.0)
        if self.num_ties is not None:
            ties = logits == self.floor
            probs.masked_fill_(ties & (ties.cumsum(-1) > self.num_ties), 0.0)
        return probs


def top_k_cut(logits: Tensor, temperature: Tensor, top_k: Tensor, max_top_k: int, top_p: Tensor | None) -> Cut:
    """The cut of top_k, ties with the last kept as in transformers, then of top_p within it.

    logits: [rows, vocab]; temperature, top_k (1 … max_top_k), top_p (float64): [rows, 1].
    """
    values, _ = largest(logits, min(max_top_k + 1, logits.shape[1]))
    kth = values.gather(1, top_k - 1)
    if top_p is None:
        return Cut(kth, None)
    weights = _weights(values, temperature).masked_fill_(values < kth, 0.0)
    total = weights.sum(-1, keepdim=True)
    if _may_hold(values[:, -1:] == kth):
        num_beyond = (logits == kth).sum(-1, keepdim=True) - (values == kth).sum(-1, keepdim=True)
        total += num_beyond * weights.gather(1, top_k - 1)
    return _boundary(values, weights, values >= kth, torch.where(top_p < 1.0, top_p * total, math.inf))


def top_p_cut(logits: Tensor, probs: Tensor, temperature: Tensor, top_p: Tensor) -> Cut:
    """The cut of top_p over the whole vocabulary; needs no sort.

    logits, probs (their softmax after temperature): [rows, vocab]; temperature, top_p (float64): [rows, 1].
    """
    width = logits.shape[1]
    if logits.is_cuda or width <= _NUM_NUCLEUS_CANDIDATES:
        return _bisect(logits, probs, top_p)
    values, _ = largest(logits, _NUM_NUCLEUS_CANDIDATES)
    weights = _weights(values, temperature)
    limit = top_p / probs.amax(-1, keepdim=True)  # in units of the largest probability, as the weights are
    cut = _boundary(values, weights, torch.ones_like(values, dtype=torch.bool), limit)
    wide = (weights.sum(-1) < limit.squeeze(1)).nonzero().squeeze(1)
    if len(wide) == 0:
        return cut
    wide_cut = _bisect(logits[wide], probs[wide], top_p[wide])
    num_ties = torch.full_like(limit, math.inf) if cut.num_ties is None else cut.num_ties
    num_ties[wide] = math.inf if wide_cut.num_ties is None else wide_cut.num_ties
    cut.floor[wide] = wide_cut.floor
    return Cut(cut.floor, num_ties if _may_hold(num_ties < math.inf) else None)


def _boundary(values: Tensor, weights: Tensor, eligible: Tensor, limit: Tensor) -> Cut:
    """Keeps from the top on until the weight kept reaches `limit`, and one in any case. All: [rows, k]."""
    kept = eligible & (weights.cumsum(-1) - weights < limit)
    kept[:, 0] = True
    num_kept = kept.sum(-1, keepdim=True)
    floor = values.gather(1, num_kept - 1)
    following = values.gather(1, num_kept.clamp(max=values.shape[1] - 1))
    if not _may_hold((following == floor) & (limit < math.inf)):
        return Cut(floor, None)
    above = weights.masked_fill(values <= floor, 0.0).sum(-1, keepdim=True)
    return Cut(floor, _num_ties(limit, above, weights.gather(1, num_kept - 1)))


def _bisect(logits: Tensor, probs: Tensor, top_p: Tensor) -> Cut:
    """The lowest floor above which there is less than top_p, by bisection over the order of float32 numbers."""

    def mass_above(floor: Tensor) -> Tensor:
        return _blocks(torch.where(logits > floor, probs, 0.0), 0.0).sum(-1, dtype=torch.float64).sum(-1, keepdim=True)

    high = _ordinal(logits.amax(-1, keepdim=True))
    low = _ordinal(torch.full_like(logits[:, :1], -math.inf))
    limit = top_p * mass_above(_from_ordinal(low))
    for _ in range(32):
        middle = (low + high) >> 1
        is_floor = mass_above(_from_ordinal(middle)) < limit
        high, low = torch.where(is_floor, middle, high), torch.where(is_floor, low, middle)
    floor = _from_ordinal(high)
    ties = logits == floor
    num_ties = _num_ties(limit, mass_above(floor), torch.where(ties, probs, 0.0).amax(-1, keepdim=True))
    return Cut(floor, num_ties if _may_hold(num_ties < ties.sum(-1, keepdim=True)) else None)


def _num_ties(limit: Tensor, above: Tensor, weight: Tensor) -> Tensor:
    return ((limit - above) / weight).ceil_().clamp_(min=1.0)


def _weights(values: Tensor, temperature: Tensor) -> Tensor:
    """Probabilities before scaling, in float64. values: [rows, k] in falling order."""
    return ((values - values[:, :1]).double() / temperature).exp_()


def _ordinal(x: Tensor) -> Tensor:
    """float32 numbers as integers in the same order (int64)."""
    bits = x.view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()


def _from_ordinal(ordinal: Tensor) -> Tensor:
    bits = ordinal.int()
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)


def _may_hold(condition: Tensor) -> bool:
    """Whether a condition holds for any row; on CUDA, where looking would wait for the device, taken as yes."""
    return condition.is_cuda or bool(condition.any())


def _blocks(x: Tensor, padding: float) -> Tensor:
    """[rows, blocks, block size]."""
    size = next((size for size in _BLOCK_SIZES if x.shape[1] % size == 0), 0)
    if not size:
        size = _BLOCK_SIZES[0]
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % size), value=padding)
    return x.view(x.shape[0], -1, size)


def _pick_block(blocks: Tensor, block: Tensor) -> Tensor:
    """[rows, block size]: one block of each row. block: [rows, 1]."""
    return blocks.gather(1, block[:, :, None].expand(-1, -1, blocks.shape[2])).squeeze(1)
