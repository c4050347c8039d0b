"""The embedded model as it is served: with the compiled kernels an answer has the same bits alone and in a crowd."""

from __future__ import annotations

import random

import pytest

from parleyd.config import ModelSettings
from parleyd.cpu_kernels.instructions import has_matrix_unit, has_vectors
from parleyd.engine.engine import Engine
from parleyd.generation import EngineRequest, SamplingParams, TokenLogprob
from parleyd.model.loader import load_model
from parleyd.worker.build import build_engine

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("two_threads"),
    pytest.mark.skipif(not has_vectors(), reason="this CPU has none of their instructions"),
]

# More than a step takes.
LONGEST = 700


@pytest.mark.parametrize(
    "four_bit_linear",
    [
        pytest.param(True, marks=pytest.mark.skipif(has_matrix_unit(), reason="of many rows, bfloat16 is computed")),
        False,
    ],
    ids=["blocks", "bfloat16"],
)
def test_an_answer_does_not_depend_on_what_runs_beside_it(*, four_bit_linear: bool) -> None:
    loaded = load_model(ModelSettings())
    settings = ModelSettings(kv_cache_memory=0.5, four_bit_linear=four_bit_linear)
    _, engine = build_engine(settings, loaded.model, loaded.info, loaded.blocks)
    chance = random.Random(0)
    prompts = {key: tuple(chance.choices(range(1000), k=chance.randint(1, LONGEST))) for key in range(16)}
    together = run(engine, prompts)
    for key in (0, 7, 15):
        assert run(engine, {key: prompts[key]}) == {key: together[key]}


def run(engine: Engine, prompts: dict[int, tuple[int, ...]]) -> dict[int, list[tuple[int, TokenLogprob]]]:
    """By key, the ids with their log-probabilities, and those of the five best. Odd keys draw, even ones do not."""
    answers: dict[int, list[tuple[int, TokenLogprob]]] = {key: [] for key in prompts}
    for key, prompt in prompts.items():
        params = SamplingParams(
            max_new_tokens=24, ignore_eos=True, do_sample=key % 2 == 1, seed=key, logprobs=True, top_logprobs=5
        )
        engine.submit(EngineRequest(key=key, prompt_ids=prompt, params=params))
    num_open = len(prompts)
    while num_open:
        for output in engine.step():
            assert output.error is None
            answers[output.key] += zip(output.token_ids, output.logprobs, strict=True)
            num_open -= output.is_last
    return answers
