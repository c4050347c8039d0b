"""Sampling parameters out of a request's configuration and the model's defaults."""

from __future__ import annotations

import pytest

from parley.v1 import generation_pb2
from parleyd.gateway.convert import to_sampling_params
from parleyd.generation import SamplingParams

SAMPLING = ("temperature", "top_p", "top_k", "min_p")


def params(do_sample_by_default: bool = False, **config: object) -> SamplingParams:
    defaults = SamplingParams(max_new_tokens=512, do_sample=do_sample_by_default, temperature=0.5)
    return to_sampling_params(generation_pb2.GenerationConfig(**config), defaults)  # type: ignore[arg-type]


@pytest.mark.parametrize("by_default", [False, True])
def test_do_sample_left_out_is_the_models_own(by_default: bool) -> None:
    assert params(by_default, max_new_tokens=3, repetition_penalty=2).do_sample is by_default


@pytest.mark.parametrize("field", SAMPLING)
def test_do_sample_left_out_is_true_where_the_request_says_how_to_sample(field: str) -> None:
    assert params(**{field: 1}).do_sample


@pytest.mark.parametrize("by_default", [False, True])
def test_do_sample_false_is_greedy_whatever_else_is_set(by_default: bool) -> None:
    assert not params(by_default, do_sample=False, **dict.fromkeys(SAMPLING, 1)).do_sample


@pytest.mark.parametrize("do_sample", [{}, {"do_sample": True}])
def test_temperature_0_is_greedy_even_if_do_sample_is_true(do_sample: dict[str, bool]) -> None:
    assert not params(True, temperature=0, **do_sample).do_sample
