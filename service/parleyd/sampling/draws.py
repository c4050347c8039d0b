"""The random numbers of sampling, and drawing a token with one: truncation to the likeliest, then inverse CDF.

Called by the sampler. A row's result depends on that row alone: elementwise operations and softmax, which computes each
row by itself, in float32; sums in float64, where their order cannot tell. Masks are float32 ones made in place
(`x.clone().ge_(y)`): on a CPU, operations on bool tensors are not vectorised and take ten times as long.
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
# The nucleus of most steps lies within so many tokens. Those of the others are looked for in all.
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
    num_rows, width = x.shape
    size = next((size for size in (64, 32, 8) if width % size == 0 and k * size * 4 <= width), 0)
    if x.is_cuda or not size:
        return x.topk(k)
    blocks = x.view(num_rows, -1, size)
    chosen = blocks.amax(-1).topk(k, sorted=False).indices
    values, places = largest(blocks[torch.arange(num_rows)[:, None], chosen].flatten(1), k)
    return values, chosen.gather(1, places // size) * size + places % size


class Cut(NamedTuple):
    """What truncation keeps of a row: the logits above `floor`, and of those equal to it the `num_ties` lowest ids."""

    floor: Tensor  # [rows, 1]
    num_ties: Tensor | None  # [rows, 1], float64; None: all

    def apply(self, logits: Tensor, probs: Tensor) -> Tensor:
        """probs [rows, vocab], with 0 for what is not kept; in place."""
        probs.mul_(logits.clone().ge_(self.floor))
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
    if logits.is_cuda:
        return _bisect(logits, probs, top_p)
    values, _ = largest(logits, min(_NUM_NUCLEUS_CANDIDATES, logits.shape[1]))
    weights = _weights(values, temperature)
    limit = top_p / probs.amax(-1, keepdim=True)  # in units of the largest probability, as the weights are
    floor, num_ties = _boundary(values, weights, torch.ones_like(values, dtype=torch.bool), limit)
    if values.shape[1] < logits.shape[1] and (wide := (weights.sum(-1) < limit[:, 0]).nonzero()[:, 0].tolist()):
        num_ties = torch.full_like(limit, math.inf) if num_ties is None else num_ties
        for row in wide:
            floor[row], num_ties[row] = _narrow_down(logits[row].numpy(), probs[row].numpy(), float(top_p[row]))
        num_ties = num_ties if bool((num_ties < math.inf).any()) else None
    return Cut(floor, num_ties)


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


def _narrow_down(logits: NDArray[np.float32], probs: NDArray[np.float32], top_p: float) -> tuple[float, float]:
    """A row's floor and number of ties, for CPUs: ever narrower histograms around the floor. logits, probs: [vocab]."""
    limit = top_p * probs.sum(dtype=np.float64)
    above = 0.0
    possible = probs > 0
    x, weights = logits[possible], probs[possible]
    while len(x) > 512 and (low := x.min()) < (high := x.max()):
        bins = ((x - low) * (1023 / (high - low))).astype(np.int64)
        mass = np.bincount(bins, weights)[::-1].cumsum() + above
        bin_from_top = min(int(mass.searchsorted(limit)), len(mass) - 1)
        above = mass[bin_from_top - 1] if bin_from_top else above
        inside = bins == len(mass) - 1 - bin_from_top
        x, weights = x[inside], weights[inside]
    order = np.argsort(-x)
    x, weights = x[order], weights[order].astype(np.float64)
    num_kept = max(1, int((above + weights.cumsum() - weights < limit).sum()))
    floor = x[num_kept - 1]
    num_ties = max(1, math.ceil((limit - above - weights[x > floor].sum()) / weights[num_kept - 1]))
    return float(floor), num_ties if num_ties < (x == floor).sum() else math.inf


def _bisect(logits: Tensor, probs: Tensor, top_p: Tensor) -> Cut:
    """The lowest floor above which there is less than top_p, by bisection over the order of float32 numbers.

    For CUDA: it asks nothing of the host, and 32 passes take less than a sort of a whole vocabulary.
    """

    def mass_above(floor: Tensor) -> Tensor:
        return _blocks(logits.clone().gt_(floor).mul_(probs), 0.0).sum(-1, dtype=torch.float64).sum(-1, keepdim=True)

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
