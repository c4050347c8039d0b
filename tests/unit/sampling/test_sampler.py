"""The sampler against transformers' logits processors, in company and alone, and at the edges of its input."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parleyd.generation import SamplingParams
from parleyd.sampling import draws, sampler
from parleyd.sampling.sampler import _changed, _probabilities
from parleyd.sampling.sampling_row import SamplingRow
from tests.support.sampling import EOS, Params, last_ids, processed, sample_all


def row(params: SamplingParams, key: int = 0, prompt: Sequence[int] = (1,), output: Sequence[int] = ()) -> SamplingRow:
    return SamplingRow(params, array("i", [*prompt, *output]), len(prompt), len(output))


def random_logits(num_rows: int, vocab_size: int, seed: int = 0, step: float = 0.0) -> Tensor:
    """[num_rows, vocab_size]; with a `step`, multiples of it, so that many are equal."""
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3
    return (logits / step).round() * step if step else logits


def sample(logits: Tensor, rows: list[SamplingRow]) -> list[int]:
    ids: list[int] = sample_all(logits, rows).token_ids.tolist()
    return ids


@torch.no_grad()
def probabilities(logits: Tensor, rows: list[SamplingRow]) -> Tensor:
    """What `sample` would draw from: [rows, vocab], not scaled to a sum of 1."""
    x = _changed(logits, rows, last_ids(rows), [EOS])
    return _probabilities(x, [row.params for row in rows])


EVERYTHING = {
    "temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3, "presence_penalty": 0.7,
    "frequency_penalty": -0.4, "logit_bias": ((7, 3.5), (11, -100.0), (12, 100.0), (EOS, 2.0)), "min_new_tokens": 50,
    "stop_token_ids": (8, 9),
}  # fmt: skip
COMBINATIONS: dict[str, dict[str, object]] = {
    "temperature low": {"temperature": 0.2}, "temperature high": {"temperature": 5.0},
    "top_k 1": {"top_k": 1}, "top_k": {"top_k": 20}, "top_k all but one": {"top_k": 96}, "top_k all": {"top_k": 97},
    "top_k beyond the vocabulary": {"top_k": 10**6},
    "top_p": {"top_p": 0.8}, "top_p tiny": {"top_p": 1e-3}, "top_p nearly 1": {"top_p": 0.999},
    "top_p hot": {"top_p": 0.95, "temperature": 8.0},
    "min_p": {"min_p": 0.1}, "min_p 1": {"min_p": 1.0},
    "top_k and top_p": {"top_k": 30, "top_p": 0.7}, "top_k and tiny top_p": {"top_k": 5, "top_p": 1e-3},
    "top_k and min_p": {"top_k": 10, "min_p": 0.2},
    "repetition": {"repetition_penalty": 2.0}, "repetition wanted": {"repetition_penalty": 0.5},
    "presence": {"presence_penalty": 2.0}, "frequency": {"frequency_penalty": -1.5},
    "bias": {"logit_bias": ((5, 4.0), (6, -100.0))}, "min_new_tokens": {"min_new_tokens": 50, "stop_token_ids": (4, 5)},
    "repetition and bias": {"repetition_penalty": 1.5, "logit_bias": tuple((id_, 3.0) for id_ in range(30))},
    "everything": EVERYTHING,
}  # fmt: skip


@pytest.mark.parametrize("vocab_size", [97, 1024])
@pytest.mark.parametrize("step", [0.0, 0.5, 3.0], ids=["distinct", "ties", "many ties"])
@pytest.mark.parametrize("name", COMBINATIONS)
def test_distribution_equals_that_of_transformers_processors(name: str, step: float, vocab_size: int) -> None:
    params = Params(do_sample=True, **COMBINATIONS[name])  # type: ignore[arg-type]
    num_rows = 24
    logits = random_logits(num_rows, vocab_size, seed=len(name), step=step)
    ids = random_logits(num_rows, 30, seed=1).abs().mul(12).long().clamp(max=vocab_size - 1).tolist()
    outputs = [ids[key][20 : 20 + key] for key in range(num_rows)]  # the first has none yet
    rows = [row(params, key, ids[key][:20], outputs[key]) for key in range(num_rows)]

    probs = probabilities(logits, rows)

    for index in range(num_rows):
        expected = processed(logits[index], params, ids[index][:20], outputs[index]).softmax(-1)
        kept, actual = probs[index] > 0, probs[index] / probs[index].sum()
        assert kept.sum() == (expected > 0).sum()
        # Which of equal logits at the edge of top_p transformers keeps is up to its sort: compare their values.
        torch.testing.assert_close(actual.sort().values, expected.sort().values, rtol=2e-5, atol=1e-7)
        if step == 0.0:
            assert torch.equal(kept, expected > 0)


@pytest.mark.parametrize(("top_k", "in_reach"), [(0, 8), (3, 5)])
def test_of_ties_at_the_edge_of_top_p_the_lowest_ids_are_kept(top_k: int, in_reach: int) -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0, 1.0, 1.0, 1.0, 0.0, -9.0]])
    weights = logits[0].double().exp()
    total = weights.sort(descending=True).values[:in_reach].sum()
    params = Params(do_sample=True, top_k=top_k, top_p=float((weights[1] + 1.5 * weights[2]) / total))
    probs = probabilities(logits, [row(params)])
    assert (probs[0] > 0).nonzero().flatten().tolist() == [1, 2, 3]


@pytest.mark.parametrize("step", [0.0, 0.25])
@pytest.mark.parametrize("spread", [0.0, 1e-4, 0.01, 0.5, 1.0, 6.0])
def test_nucleus_of_a_large_vocabulary_is_found_however_wide_it_is(
    monkeypatch: pytest.MonkeyPatch, spread: float, step: float
) -> None:
    logits = random_logits(4, 8192, seed=5, step=step) * spread
    logits[:, 5::7] = -math.inf
    top_ps = [0.3, 0.9, 0.999, 1e-6]
    probs = probabilities(logits, [row(Params(do_sample=True, top_p=top_p), key) for key, top_p in enumerate(top_ps)])
    # The device's way, which must find the same.
    monkeypatch.setattr(draws, "_search", draws._bisect)
    bisected = draws.keep_top_p(logits.softmax(-1), torch.tensor(top_ps, dtype=torch.float64)[:, None])
    for index, top_p in enumerate(top_ps):
        values = logits[index].double().softmax(-1).sort(descending=True).values
        num_kept = int((values.cumsum(-1) - values < top_p).sum())
        for kept in (probs[index] > 0, bisected[index] > 0):
            # float32 rounding may move the edge by a token or two of next to no weight, and swap those beside it.
            assert abs(int(kept.sum()) - num_kept) <= 1 + num_kept // 1000
            least = logits[index][kept].min()
            assert least > logits[index][~kept].max() - 1e-5
            of_the_least = kept[logits[index] == least]
            assert of_the_least[: int(of_the_least.sum())].all()


def test_a_nucleus_that_only_rounding_keeps_from_being_all_is_all_but_what_has_no_weight() -> None:
    probs = random_logits(40, 4096, seed=1).softmax(-1)
    top_p = torch.full((40, 1), 1 - 2**-53, dtype=torch.float64)
    kept = draws.keep_top_p(probs.clone(), top_p)
    torch.testing.assert_close(kept.sum(-1), probs.sum(-1))


MIXED = [
    {}, {"repetition_penalty": 1.2}, {"do_sample": True}, {"do_sample": True, "temperature": 0.5, "min_p": 0.05},
    {"do_sample": True, "top_k": 5}, {"do_sample": True, "top_k": 50, "top_p": 0.9}, {"do_sample": True, "top_p": 0.9},
    {"do_sample": True, "top_p": 0.95, "temperature": 4.0}, {"do_sample": True, **EVERYTHING},
    {"logprobs": True, "top_logprobs": 3},
]  # fmt: skip


@pytest.mark.parametrize(("vocab_size", "step"), [(97, 0.0), (1000, 0.125), (1056, 0.0), (4096, 0.125), (49152, 0.0)])
def test_a_rows_token_is_the_same_in_any_company_and_order(vocab_size: int, step: float) -> None:
    num_rows = 64
    logits = random_logits(num_rows, vocab_size, seed=3, step=step)
    output = (5, 6, 5, 12)
    rows = [row(Params(seed=key, **MIXED[key % len(MIXED)]), key, (1, 2, 3), output) for key in range(num_rows)]  # type: ignore[arg-type]
    together = sample(logits, rows)

    for size in (1, 2, 7):
        starts = range(0, num_rows, size if size > 1 else 3)
        for start in starts:
            part = slice(start, start + size)
            assert sample(logits[part], rows[part]) == together[part]
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(4)).tolist()
    assert sample(logits[order], [rows[index] for index in order]) == [together[index] for index in order]


def test_probabilities_are_bit_equal_alone_and_among_others() -> None:
    logits = random_logits(16, 1001, seed=8)
    rows = [row(Params(do_sample=True, **EVERYTHING), key, (1, 2), (5, 6)) for key in range(16)]  # type: ignore[arg-type]
    together = probabilities(logits, rows)
    for index in range(16):
        alone = probabilities(logits[index : index + 1], rows[index : index + 1])
        assert torch.equal(alone[0], together[index])


def test_greedy_takes_the_lowest_id_of_the_largest_logits_in_every_type() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = random_logits(9, 1000, step=4.0).to(dtype)
        expected = logits.float().argmax(-1).tolist()
        assert sample(logits, [row(Params(), key) for key in range(9)]) == expected
        among = sample(logits, [row(Params(do_sample=key == 4), key) for key in range(9)])
        assert among[:4] + among[5:] == expected[:4] + expected[5:]


def test_temperature_0_is_greedy() -> None:
    logits = random_logits(4, 97)
    rows = [row(Params(do_sample=True, temperature=0.0), key) for key in range(4)]
    assert sample(logits, rows) == logits.argmax(-1).tolist()


def test_the_callers_logits_are_left_as_they_are() -> None:
    logits = random_logits(len(MIXED), 1024)
    before = logits.clone()
    sample(logits, [row(Params(**one), key, (1, 2), (5,)) for key, one in enumerate(MIXED)])  # type: ignore[arg-type]
    assert torch.equal(logits, before)


def test_params_of_today_without_the_newer_fields_are_taken() -> None:
    assert sample(random_logits(1, 97), [row(SamplingParams(max_new_tokens=3, do_sample=True, seed=2**64 - 1))])


def test_penalties_follow_the_ids_sampled_on_the_device() -> None:
    """Rows come and go, and their ids reach the host a step late."""
    vocab_size, num_steps = 60, 90
    choices = [
        Params(
            do_sample=True,
            seed=key,
            **(EVERYTHING if key % 2 else {"repetition_penalty": 1.5, "presence_penalty": 1.0}),
        )  # type: ignore[arg-type]
        for key in range(6)
    ]
    outputs: dict[int, list[int]] = {key: [] for key in range(6)}
    before: list[int] = []
    for step in range(num_steps):
        running = [key for key in (3, 0, 5, 1, 4, 2) if (step // 10 + key) % 3]
        logits = random_logits(len(running), vocab_size, seed=step)
        rows, late = [], []
        for key in running:
            full = row(choices[key], key, (1, 2, 50), outputs[key])
            rows.append(full)
            late.append(full._replace(token_ids=full.token_ids[:-1]) if key in before and outputs[key] else full)
        ids = sampler.sample(logits, late, last_ids(rows), [EOS]).token_ids.tolist()
        assert ids == sample(logits, rows), step
        for key, id_ in zip(running, ids, strict=True):
            outputs[key].append(id_)
        before = running


def test_draws_go_on_as_before_after_a_pause() -> None:
    params = Params(do_sample=True, seed=11, repetition_penalty=1.1)
    logits = random_logits(12, 97, seed=2)

    def generate(pauses: set[int]) -> list[int]:
        output = [7]
        for step in range(12):
            if step in pauses:
                sample_all(logits[:1], [row(Params(), 99)])
            one = [row(params, 1, (1, 2), output)]
            output.append(int(sample_all(logits[step : step + 1], one).token_ids))
        return output

    assert generate({3, 4, 9}) == generate(set())


@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize("do_sample", [False, True])
def test_eos_and_stop_ids_are_masked_until_min_new_tokens(do_sample: bool, ignore_eos: bool) -> None:
    params = Params(
        do_sample=do_sample, min_new_tokens=2, stop_token_ids=(8,), ignore_eos=ignore_eos, logit_bias=((EOS, 100.0),)
    )
    logits = torch.zeros(1, 97)
    logits[0, 8] = 90.0
    output: list[int] = []
    for _ in range(3):
        output.append(int(sample_all(logits, [row(params, 1, (1,), output)]).token_ids))
    assert not {EOS, 8} & set(output[:2])
    assert output[2] == EOS


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = random_logits(4, 1000, seed=6)
    wanted = Params(do_sample=True, logprobs=True, top_logprobs=5, **EVERYTHING)  # type: ignore[arg-type]
    rows = [
        row(Params(), 0),
        row(wanted, 1),
        row(Params(logprobs=True), 2),
        row(Params(logprobs=True, top_logprobs=2), 3),
    ]
    sampled = sample_all(logits, rows)

    assert sampled.logprobs is not None
    assert sampled.logprobs.rows == [1, 2, 3]
    assert sampled.logprobs.num_top == [5, 0, 2]
    expected = logits.log_softmax(-1)[1:]
    torch.testing.assert_close(
        sampled.logprobs.token_logprobs, expected.gather(1, sampled.token_ids[1:, None]).squeeze(1), rtol=0, atol=1e-6
    )
    values, ids = expected.topk(20)
    assert sampled.logprobs.top_ids is not None
    assert torch.equal(sampled.logprobs.top_ids, ids)
    assert torch.equal(sampled.logprobs.top_logprobs, values)
    by_row = sampled.logprobs.by_row()
    assert list(by_row) == [1, 2, 3]
    assert by_row[2] == (sampled.logprobs.token_logprobs[1].item(), ())
    assert by_row[3].top == tuple(zip(ids[2].tolist()[:2], values[2].tolist()[:2], strict=True))
    assert sample_all(logits[:1], rows[:1]).logprobs is None


extreme_params = st.builds(
    Params,
    do_sample=st.booleans(),
    temperature=st.sampled_from([0.0, 1e-45, 1e-38, 1e-5, 1.0, 10.0]),
    top_k=st.sampled_from([0, 1, 2, 50, 129, 130, 2**31 - 1]),
    top_p=st.sampled_from([1e-45, 1e-9, 0.5, 1 - 2**-53, 1.0]),
    min_p=st.sampled_from([0.0, 1e-45, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1e-38, 0.5, 1.0, 10.0]),
    presence_penalty=st.sampled_from([-2.0, 0.0, 2.0]),
    frequency_penalty=st.sampled_from([-2.0, 0.0, 2.0]),
    logit_bias=st.sampled_from([(), ((5, 100.0), (6, -100.0)), ((EOS, 100.0), (129, 100.0))]),
    min_new_tokens=st.sampled_from([0, 100]),
    seed=st.integers(0, 2**64 - 1),
    choice=st.integers(0, 15),
    top_logprobs=st.sampled_from([0, 20]),
)


@settings(max_examples=150, deadline=None)
@given(
    params=st.lists(extreme_params, min_size=1, max_size=4),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 100.0, 1e4, 1e25]),
    mask=st.sampled_from([0.0, 0.5, 0.98]),
)
def test_extreme_but_valid_values_neither_fail_nor_draw_a_masked_id(
    params: list[Params], scale: float, mask: float
) -> None:
    vocab_size = 130
    logits = random_logits(len(params), vocab_size, seed=len(params)) * scale
    masked = torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) < mask
    masked[:, 77] = False
    logits.masked_fill_(masked, -math.inf)
    rows = [row(one, key, (1, 2, 5, 129), (6, 6, 6, 77)) for key, one in enumerate(params)]
    for index, (one, id_) in enumerate(zip(params, sample(logits, rows), strict=True)):
        assert 0 <= id_ < vocab_size
        assert not masked[index, id_]
        assert not (one.min_new_tokens and id_ == EOS)


def test_a_vocabulary_wider_than_a_cpu_draws_from_at_once_is_drawn_from() -> None:
    logits = torch.full((2, 2**20), -math.inf)
    logits[0, 7] = logits[1, -1] = 0.0
    assert sample(logits, [row(Params(do_sample=True), key) for key in range(2)]) == [7, 2**20 - 1]


def test_logits_that_are_not_numbers_give_some_id_and_no_exception() -> None:
    logits = torch.full((len(MIXED), 1000), math.nan)
    logits[::2] = -math.inf
    ids = sample(logits, [row(Params(**one), key) for key, one in enumerate(MIXED)])  # type: ignore[arg-type]
    assert all(0 <= id_ < 1000 for id_ in ids)


def test_of_equal_log_probabilities_the_lowest_ids_come_first() -> None:
    logits = random_logits(4, 1024, step=0.5)
    rows = [row(SamplingParams(max_new_tokens=9, logprobs=True, top_logprobs=n), key=n) for n in (1, 2, 5, 20)]
    sampled = sample_all(logits, rows)
    assert sampled.logprobs is not None
    for index, logprob in sampled.logprobs.by_row().items():
        assert logprob.top[0] == (int(sampled.token_ids[index]), logprob.logprob)
        assert list(logprob.top) == sorted(logprob.top, key=lambda one: (-one[1], one[0]))
