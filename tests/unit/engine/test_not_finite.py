"""NaN and infinity: a request whose logits are not finite fails, and hurts none of its neighbours, now or later."""

from __future__ import annotations

import math
from typing import Any

import pytest

from parleyd.engine.batching import BrokenStateError
from parleyd.engine.engine import Engine
from parleyd.engine.generate import GenerateEngine
from parleyd.errors import StartupError
from parleyd.generation import NOT_FINITE, EngineRequest, Output
from parleyd.worker import load
from tests.support.tiny_models import CONTEXT, EOS, info_of, make_engine, make_model, oracle, prompts, request, run

BAD_ID, BAD_KEY = 33, 99  # an id that neither the prompts here nor their answers have
BAD_PROMPT = (*range(34, 60), BAD_ID, *range(60, 70))
CHOICES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"do_sample": True},
    "top_k": {"do_sample": True, "top_k": 5, "top_p": 0.9},
    "top_p": {"do_sample": True, "top_p": 0.9, "min_p": 0.1},
    "penalised": {"repetition_penalty": 1.2, "min_new_tokens": 4, "logprobs": True, "top_logprobs": 3},
}


def last_output(engine: Engine, key: int) -> Output:
    while True:
        for output in engine.step():
            if output.key == key and output.is_last:
                return output


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("kind", ["batching", "generate"])
def test_a_request_whose_logits_are_not_finite_fails(kind: str, name: str, value: float) -> None:
    model = make_model("Llama")
    engine = make_engine(model) if kind == "batching" else GenerateEngine(model, (EOS,), CONTEXT)
    model.get_input_embeddings().weight.data[BAD_ID] = value
    engine.submit(request(BAD_KEY, BAD_PROMPT, **CHOICES[name]))
    output = last_output(engine, BAD_KEY)
    assert output.error is not None and not output.token_ids
    if kind == "batching" or name in ("greedy", "penalised"):  # where transformers itself draws, it complains
        assert NOT_FINITE in output.error
    engine.submit(request(1, (5, 6)))
    assert last_output(engine, 1).error is None


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("limits", [{}, {"max_batch_tokens": 16}], ids=str)
def test_its_neighbours_are_unharmed_and_so_is_who_gets_its_blocks(
    limits: dict[str, int], lean: bool, overlap: bool
) -> None:
    some = prompts(8)
    reference = make_model("Llama")
    expected = [oracle(reference, prompt) for prompt in some]
    model = make_model("Llama")
    embedding = model.get_input_embeddings().weight.data
    engine = make_engine(model, lean=lean, overlap=overlap, num_blocks=34, **limits)
    embedding[BAD_ID] = math.nan
    for _ in range(3):
        engine.submit(request(BAD_KEY, BAD_PROMPT))
        requests = [request(key, prompt) for key, prompt in enumerate(some)]
        ids: dict[int, list[int]] = {key: [] for key in range(8)}
        for one in requests:
            engine.submit(one)
        errors, num_open = {}, 9
        while num_open:
            for output in engine.step():
                num_open -= output.is_last
                if output.error is not None:
                    errors[output.key] = output.error
                else:
                    ids[output.key] += output.token_ids
        assert errors == {BAD_KEY: NOT_FINITE}
        assert [ids[key] for key in range(8)] == expected
    engine._scheduler.check_integrity()


@pytest.mark.parametrize("lean", [True, False])
def test_what_pads_a_shorter_neighbours_blocks_is_not_its(lean: bool) -> None:
    """Tables of blocks are padded in a step, here in that in which it gets its own."""
    some = [(5, 6, 7), prompts(8)[0]]
    reference = make_model("Llama")
    expected = [oracle(reference, prompt) for prompt in some]
    model = make_model("Llama")
    embedding = model.get_input_embeddings().weight.data
    engine = make_engine(model, lean=lean)
    embedding[BAD_ID] = math.nan
    engine.submit(request(50, (5,), max_new_tokens=1))  # has the first block, and leaves it to the next
    for key, prompt in enumerate(some):
        engine.submit(request(key, prompt))
    outputs = engine.step()
    engine.submit(request(BAD_KEY, BAD_PROMPT))
    while sum(output.is_last for output in outputs) < 4:
        outputs += engine.step()
    assert {output.key for output in outputs if output.error} == {BAD_KEY}
    for key in (0, 1):
        assert [token_id for output in outputs if output.key == key for token_id in output.token_ids] == expected[key]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("lean", [True, False])
def test_one_that_is_cancelled_before_it_could_fail_harms_nobody_either(lean: bool, overlap: bool) -> None:
    prompt = (40, 41)  # shorter than what the other leaves in the block that both get
    expected = oracle(make_model("Llama"), prompt)
    model = make_model("Llama")
    model.get_input_embeddings().weight.data[BAD_ID] = math.nan
    engine = make_engine(model, lean=lean, overlap=overlap, max_batch_tokens=16)
    engine.submit(request(50, (5,), ignore_eos=True, max_new_tokens=40))  # gives tokens while the other gives none
    engine.submit(request(BAD_KEY, BAD_PROMPT))
    for _ in range(2):
        assert {output.key for output in engine.step()} == {50}
    engine.abort(BAD_KEY)
    engine.submit(request(1, prompt))
    outputs = engine.step()
    while sum(output.is_last for output in outputs) < 2:
        outputs += engine.step()
    assert not [output.error for output in outputs if output.error]
    assert [token_id for output in outputs if output.key == 1 for token_id in output.token_ids] == expected


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("lean", [True, False])
def test_no_block_that_a_chunk_ends_in_has_anything_of_another(lean: bool, overlap: bool) -> None:
    prompt = tuple(range(40, 90)) * 4
    expected = oracle(make_model("Llama", num_hidden_layers=3), prompt)
    model = make_model("Llama", num_hidden_layers=3)
    model.get_input_embeddings().weight.data[BAD_ID] = math.nan
    engine = make_engine(model, lean=lean, overlap=overlap, num_blocks=40, max_batch_tokens=12, max_running=4)
    engine.submit(request(50, (5,), ignore_eos=True, max_new_tokens=100))  # so that each step has an output
    engine.submit(request(BAD_KEY, (BAD_ID, *range(5, 30)) * 8))
    for _ in range(15):
        engine.step()
    engine.abort(BAD_KEY)
    assert run_beside(engine, request(1, prompt)) == expected


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("lean", [True, False])
def test_who_is_given_a_copy_of_a_prompts_end_gets_nothing_of_the_answer_behind_it(lean: bool, overlap: bool) -> None:
    prompt = tuple(range(40, 53))
    (bad,) = oracle(make_model("Llama"), prompt, 1)
    model = make_model("Llama")
    model.get_input_embeddings().weight.data[bad] = math.nan
    engine = make_engine(model, lean=lean, overlap=overlap)
    engine.submit(request(BAD_KEY, prompt))
    assert [output.token_ids for output in engine.step()] == [(bad,)]
    # With overlap a step is in flight in which what follows `bad` is written, and not known to be wrong yet.
    assert run_beside(engine, request(1, prompt, logit_bias=((bad, -100.0),), max_new_tokens=1)) != [bad]


def run_beside(engine: Engine, one: EngineRequest) -> list[int]:
    """Its ids, whatever becomes of others."""
    engine.submit(one)
    outputs: list[Output] = []
    while not outputs or not outputs[-1].is_last:
        outputs += [output for output in engine.step() if output.key == one.key]
    assert outputs[-1].error is None
    return [token_id for output in outputs for token_id in output.token_ids]


def test_nobody_finds_its_prefix() -> None:
    model = make_model("Llama")
    embedding = model.get_input_embeddings().weight.data
    sound = embedding[BAD_ID].clone()
    engine = make_engine(model, max_batch_tokens=16)
    embedding[BAD_ID] = math.nan
    engine.submit(request(BAD_KEY, BAD_PROMPT))
    assert last_output(engine, BAD_KEY).error == NOT_FINITE
    embedding[BAD_ID] = sound
    assert run(engine, request(1, BAD_PROMPT))[1] == oracle(make_model("Llama"), BAD_PROMPT)


@pytest.mark.parametrize("overlap", [False, True])
def test_weights_that_are_not_finite_end_the_engine(overlap: bool) -> None:
    model = make_model("Llama")
    engine = make_engine(model, overlap=overlap, max_batch_tokens=16)
    norm = model.model.norm.weight.data
    sound = norm.clone()

    def fail(key: int) -> None:
        norm[:] = math.nan
        engine.submit(request(key, (*range(40, 70), key)))
        assert last_output(engine, key).error == NOT_FINITE

    fail(1)
    fail(2)
    norm[:] = sound
    assert run(engine, request(3, (5, 6)))[3], "a token makes the failures before it those of requests"
    for key in (4, 5, 6):
        fail(key)
    with pytest.raises(BrokenStateError, match="3 steps"):
        engine.step()


def test_a_model_of_nan_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("Llama")
    engine = make_engine(model)
    model.model.norm.weight.data[:] = math.nan
    with pytest.raises(StartupError, match="cannot generate with this model: the model's logits are not finite"):
        load._warm_up(engine, info_of(model))
