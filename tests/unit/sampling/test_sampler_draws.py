"""The random numbers of sampling and the distributions they lead to. Every seed is fixed: nothing here is random."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from parleyd.sampling import draws
from parleyd.sampling.sampling_row import SamplingRow
from tests.support.sampling import Params, processed, sample_all

NUM_DRAWS = 8_000


def stream(seed: int, num: int, choice: int = 0) -> NDArray[np.float64]:
    key = draws.stream_key(seed, choice)
    return np.array([draws.uniform(key, position) for position in range(num)])


def first_of(seeds: Iterable[int], position: int = 0, choice: int = 0) -> NDArray[np.float64]:
    return np.array([draws.uniform(draws.stream_key(seed, choice), position) for seed in seeds])


def excess_chi_squared(observed: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    """How many standard deviations chi-squared lies above its mean, over the cells that expect 5 or more."""
    many = expected >= 5.0
    observed = np.append(observed[many], observed[~many].sum())
    expected = np.append(expected[many], expected[~many].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    if len(expected) < 2:
        return 0.0
    chi_squared = ((observed - expected) ** 2 / expected).sum()
    return float((chi_squared - (len(expected) - 1)) / math.sqrt(2 * (len(expected) - 1)))


def assert_uniform(numbers: NDArray[np.float64]) -> None:
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    bins = np.bincount((numbers * 128).astype(int), minlength=128)
    assert abs(excess_chi_squared(bins.astype(float), np.full(128, len(numbers) / 128))) < 4.0


def assert_independent(first: NDArray[np.float64], second: NDArray[np.float64]) -> None:
    cells = (first * 16).astype(int) * 16 + (second * 16).astype(int)
    bins = np.bincount(cells, minlength=256)
    assert abs(excess_chi_squared(bins.astype(float), np.full(256, len(first) / 256))) < 4.0
    assert abs(np.corrcoef(first, second)[0, 1]) < 4.0 / math.sqrt(len(first))


def test_numbers_are_those_of_splitmix64() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [draws.uniform(1234567, position) * 2**53 for position in range(3)] == [number >> 11 for number in published]


@pytest.mark.parametrize("seed", [0, 1, 42, 2**63, 2**64 - 1])
def test_positions_of_a_stream_are_uniform_and_independent(seed: int) -> None:
    numbers = stream(seed, 50_000)
    assert_uniform(numbers)
    assert_independent(numbers[:-1], numbers[1:])


@pytest.mark.parametrize("position", [0, 1, 1000])
def test_neighbouring_seeds_are_uniform_and_independent(position: int) -> None:
    numbers = first_of(range(30_000), position)
    assert_uniform(numbers)
    assert_independent(numbers[:-1], numbers[1:])
    assert_independent(numbers, first_of(range(30_000), position, choice=1))
    # Seeds that differ by SplitMix64's own step must not have the same stream a position apart.
    shifted = (seed + draws._GAMMA for seed in range(30_000))
    assert_independent(first_of(range(30_000), 1), first_of(shifted))


def test_neighbouring_choices_have_unrelated_streams() -> None:
    assert_independent(stream(7, 30_000, choice=0), stream(7, 30_000, choice=1))
    assert_independent(stream(7, 30_000, choice=0)[1:], stream(8, 30_000, choice=0)[:-1])


def observe(params: Params, logits: torch.Tensor) -> NDArray[np.float64]:
    """How often each id is drawn, over NUM_DRAWS seeds."""
    vocab_size = logits.shape[1]
    prompt, output = (1, 2, 9), (5, 5, 6)
    rows = [
        SamplingRow(replace(params, seed=seed), prompt + output, len(prompt), len(output)) for seed in range(NUM_DRAWS)
    ]
    sampled = sample_all(logits.expand(NUM_DRAWS, -1), rows)
    return np.bincount(sampled.token_ids.numpy(), minlength=vocab_size).astype(float)


DISTRIBUTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "temperature low": {"temperature": 0.5},
    "temperature high": {"temperature": 3.0},
    "top_k": {"top_k": 12},
    "top_p": {"top_p": 0.8},
    "top_k and top_p": {"top_k": 30, "top_p": 0.9},
    "min_p": {"min_p": 0.1},
    "repetition": {"repetition_penalty": 1.8},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -1.0},
    "bias": {"logit_bias": ((4, 2.0), (7, -3.0))},
    "min_new_tokens": {"min_new_tokens": 10, "stop_token_ids": (2, 4)},
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_follow_the_exact_distribution_and_the_test_would_see_another(name: str) -> None:
    params = Params(do_sample=True, **DISTRIBUTIONS[name])  # type: ignore[arg-type]
    logits = torch.randn(1, 80, generator=torch.Generator().manual_seed(9)) * 1.2
    logits[0, :10] += 1.5
    observed = observe(params, logits)
    scores = processed(logits[0], params, (1, 2, 9), (5, 5, 6)).double()
    expected = scores.softmax(-1).numpy() * NUM_DRAWS

    assert observed[expected == 0].sum() == 0
    assert excess_chi_squared(observed, expected) < 4.0
    assert excess_chi_squared(observed, (scores / 1.5).softmax(-1).numpy() * NUM_DRAWS) > 8.0
    if name != "plain":
        unchanged = logits[0].double().softmax(-1).numpy() * NUM_DRAWS
        assert excess_chi_squared(observed, unchanged) > 4.0


def test_draws_of_one_seed_over_its_positions_follow_the_distribution() -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(2))
    probs = logits.softmax(-1)
    uniform = torch.from_numpy(stream(123, NUM_DRAWS))
    ids = draws.draw(probs.expand(NUM_DRAWS, -1), uniform)
    observed = np.bincount(ids.numpy(), minlength=40).astype(float)
    assert excess_chi_squared(observed, probs[0].double().numpy() * NUM_DRAWS) < 4.0


@pytest.mark.parametrize("vocab_size", [1, 7, 97, 256, 1000, 4096])
def test_a_draw_is_the_inverse_of_the_cumulated_probabilities(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    probs = torch.rand(200, vocab_size, generator=generator).pow(8)
    probs[torch.rand(probs.shape, generator=generator) < 0.5] = 0.0
    probs[:, vocab_size // 2] = 1.0
    uniform = torch.rand(200, generator=generator, dtype=torch.float64)
    uniform[:4] = torch.tensor([0.0, 0.0, 1.0 - 2.0**-53, 1.0 - 2.0**-53])
    cumulated = probs.double().cumsum(-1)
    expected = (cumulated <= uniform[:, None] * cumulated[:, -1:]).sum(-1).clamp(max=vocab_size - 1)
    ids = draws.draw(probs, uniform)
    assert (probs.gather(1, ids[:, None]) > 0).all()
    assert torch.equal(ids[:2], expected[:2])
    assert torch.equal(ids[4:], expected[4:])
    last = torch.where(probs > 0, torch.arange(vocab_size), -1).amax(-1)
    assert torch.equal(ids[2:4], last[2:4])


@pytest.mark.parametrize("k", [1, 20, 51, 64, 65, 256])
@pytest.mark.parametrize("vocab_size", [300, 4096, 49152])
def test_largest_finds_the_values_of_topk_and_ids_that_hold_them(vocab_size: int, k: int) -> None:
    x = (torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(k)) * 8).round() / 8
    values, ids = draws.largest(x, k)
    assert torch.equal(values, x.topk(k).values)
    assert torch.equal(x.gather(1, ids), values)
    assert all(len(set(one)) == k for one in ids.tolist())
