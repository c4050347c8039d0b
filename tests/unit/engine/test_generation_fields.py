"""What changes single logits, and log-probabilities: both engines against a plain loop over the model's own logits."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from parleyd.engine.engine import Engine
from parleyd.engine.generate import GenerateEngine
from parleyd.engine.generate_config import own_config, request_config
from parleyd.generation import EngineRequest, SamplingParams, TokenLogprob
from tests.support.tiny_models import BLOCK_SIZE, CONTEXT, EOS, make_engine, make_model
from tests.support.tiny_models import run as run_requests

KEYS = itertools.count()
PROMPT = (5, 17, 42, 8, 13, 42)
FIELDS: dict[str, dict[str, Any]] = {
    "presence_penalty": {"presence_penalty": 2.0},
    "frequency_penalty": {"frequency_penalty": 1.5},
    "negative": {"presence_penalty": -2.0, "frequency_penalty": -2.0},
    "logit_bias": {"logit_bias": ((7, 10.0), (9, -100.0)), "presence_penalty": 2.0},
    "all": {
        "presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.3, "min_new_tokens": 8,
        "logit_bias": ((7, 3.0), (3, 9.0)),
    },
}  # fmt: skip


@pytest.fixture(params=["batching", "generate"])
def engine(request: pytest.FixtureRequest) -> Engine:
    model = make_model("Llama")
    return make_engine(model) if request.param == "batching" else GenerateEngine(model, (EOS,), CONTEXT)


def run(engine: Engine, *, output: tuple[int, ...] = (), **params: Any) -> tuple[list[int], list[TokenLogprob]]:
    sampling = SamplingParams(**{"max_new_tokens": 16, **params})
    engine.submit(EngineRequest(key=next(KEYS), prompt_ids=PROMPT, output_ids=output, params=sampling))
    outputs = engine.step()
    while not outputs[-1].is_last:
        outputs += engine.step()
    assert outputs[-1].error is None
    assert all(len(one.logprobs) in (0, len(one.token_ids)) for one in outputs)
    return [i for one in outputs for i in one.token_ids], [x for one in outputs for x in one.logprobs]


def expected_ids(model: LlamaForCausalLM, params: SamplingParams) -> list[int]:
    ids: list[int] = []
    while len(ids) < params.max_new_tokens and EOS not in ids:
        with torch.no_grad():
            logits = model(torch.tensor([[*PROMPT, *ids]])).logits[0, -1]
        for token_id, bias in params.logit_bias:
            logits[token_id] += bias
        for token_id in {*PROMPT, *ids}:
            logits[token_id] *= params.repetition_penalty ** (-1 if logits[token_id] > 0 else 1)
        if len(ids) < params.min_new_tokens:
            logits[EOS] = -torch.inf
        for token_id, count in Counter(ids).items():
            logits[token_id] -= params.presence_penalty + count * params.frequency_penalty
        ids.append(int(logits.argmax()))
    return ids


@pytest.mark.parametrize("name", FIELDS)
def test_greedy_ids_with_penalties_and_biases_are_those_of_a_plain_loop(engine: Engine, name: str) -> None:
    expected = expected_ids(make_model("Llama"), SamplingParams(max_new_tokens=16, **FIELDS[name]))
    assert expected != expected_ids(make_model("Llama"), SamplingParams(max_new_tokens=16))
    ids, _ = run(engine, **FIELDS[name])
    assert ids == expected
    assert run(engine, output=tuple(ids[:5]), **FIELDS[name])[0] == ids[5:]


def test_biases_come_before_the_repetition_penalty_as_in_model_generate(engine: Engine) -> None:
    """Of ids in the prompt, where the order tells."""
    biases = {0: 1.0, 5: 3.0, 17: 3.0, 42: 3.0, 60: 2.0, 9: -4.0, EOS: 6.0}
    config = GenerationConfig(
        max_new_tokens=16, do_sample=False, eos_token_id=EOS, pad_token_id=0, min_new_tokens=6, repetition_penalty=1.5,
        sequence_bias={(token_id,): bias for token_id, bias in biases.items()},
    )  # fmt: skip
    sequences = make_model("Llama").generate(torch.tensor([PROMPT]), generation_config=config)
    params = {"logit_bias": tuple(biases.items()), "repetition_penalty": 1.5, "min_new_tokens": 6}
    assert run(engine, **params)[0] == sequences[0, len(PROMPT) :].tolist()


def test_biases_add_to_those_that_the_model_has_of_itself() -> None:
    own = own_config(GenerationConfig(sequence_bias=[[[7], 2.0], [[8, 9], 1.0]]))
    config = request_config(own, SamplingParams(max_new_tokens=1, logit_bias=((7, 3.0), (9, 1.5))), 1, 0, [])
    assert config.sequence_bias == {(7,): 5.0, (8, 9): 1.0, (9,): 1.5}


@pytest.mark.parametrize("sampled", [{}, {"do_sample": True, "temperature": 2.0, "seed": 3}], ids=["greedy", "drawn"])
def test_logprobs_are_of_the_models_own_distribution(engine: Engine, sampled: dict[str, Any]) -> None:
    ids, logprobs = run(engine, logprobs=True, top_logprobs=4, **sampled, **FIELDS["all"])
    with torch.no_grad():
        raw = make_model("Llama")(torch.tensor([[*PROMPT, *ids]])).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    values, top_ids = raw.topk(4)
    for position, (token_id, logprob) in enumerate(zip(ids, logprobs, strict=True)):
        assert logprob.logprob == pytest.approx(float(raw[position, token_id]), abs=1e-4)
        assert [top_id for top_id, _ in logprob.top] == top_ids[position].tolist()
        assert [value for _, value in logprob.top] == pytest.approx(values[position].tolist(), abs=1e-4)


def test_logprobs_come_without_the_likeliest_tokens_and_only_where_asked_for(engine: Engine) -> None:
    ids, logprobs = run(engine, logprobs=True)
    assert len(logprobs) == len(ids) and not any(logprob.top for logprob in logprobs)
    assert run(engine)[1] == []


def test_a_choice_has_draws_of_its_own_and_the_first_those_of_a_single_answer(engine: Engine) -> None:
    sampled = {"do_sample": True, "temperature": 1.5, "seed": 7, "ignore_eos": True}
    answers = [run(engine, choice=choice, **sampled)[0] for choice in range(4)]
    assert len({tuple(answer) for answer in answers}) == 4
    assert run(engine, **sampled)[0] == answers[0]


@pytest.mark.parametrize("num_prompt", [5, 5 * BLOCK_SIZE, 5 * BLOCK_SIZE + 3])
@pytest.mark.parametrize("how", [{}, {"overlap": True}, {"num_blocks": 42, "context": 160}], ids=str)
def test_choices_share_the_firsts_prompt_and_are_what_each_would_be_alone(how: dict[str, Any], num_prompt: int) -> None:
    model = make_model("Llama")
    prompt = tuple(range(10, 10 + num_prompt))
    params = SamplingParams(max_new_tokens=20, do_sample=True, temperature=1.5, seed=1, ignore_eos=True)
    choices = [
        EngineRequest(key=choice, prompt_ids=prompt, params=replace(params, choice=choice)) for choice in range(16)
    ]
    alone = [run_requests(make_engine(model), one)[one.key] for one in choices]
    engine = make_engine(model, **how)
    engine.submit(choices[0])
    outputs = engine.step()
    for one in choices[1:]:
        engine.submit(one)
    while sum(output.is_last for output in outputs) < 16:
        outputs += engine.step()
    for choice in range(16):
        assert [token for output in outputs if output.key == choice for token in output.token_ids] == alone[choice]
    stats = engine.stats()
    assert stats.num_prompt_tokens - stats.num_cached_prompt_tokens == num_prompt + 15
    assert {output.cached_prompt_tokens for output in outputs if output.key} == {num_prompt - 1}
    assert stats.num_used_blocks == 0
    assert bool(stats.num_preemptions) == ("num_blocks" in how)
