"""Encoder-decoders in engine `generate`: the encoder reads the prompt, and answers begin with an id of their own."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel

from parleyd.config import ModelSettings
from parleyd.engine.generate import GenerateEngine
from parleyd.errors import StartupError
from parleyd.generation import EngineRequest, FinishReason, SamplingParams
from parleyd.worker.build import build_engine
from tests.support.tiny_models import VOCAB_SIZE, info_of, run

EOS, CONTEXT, ROOM = 1, 128, 12
PROMPT = (5, 17, 42, 8, 13, 66, 3, 20, 21)
FAMILIES: dict[str, dict[str, Any]] = {
    "T5": {
        "d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8, "decoder_start_token_id": 0,
        "initializer_factor": 4.0,
    },
    "Bart": {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": CONTEXT,
        "init_std": 0.5, "forced_eos_token_id": None, "eos_token_id": EOS,
    },
}  # fmt: skip


def make_model(family: str, **config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}Config")(**{"vocab_size": VOCAB_SIZE, **FAMILIES.get(family, {}), **config})
    model: PreTrainedModel = getattr(transformers, f"{family}ForConditionalGeneration")(made)
    return model.eval()


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def engine(family: str) -> GenerateEngine:
    return GenerateEngine(make_model(family), (EOS,), CONTEXT)


def request(key: int = 1, output: tuple[int, ...] = (), **params: Any) -> EngineRequest:
    sampling = SamplingParams(**{"max_new_tokens": ROOM, "ignore_eos": True, **params})
    return EngineRequest(key=key, prompt_ids=PROMPT, output_ids=output, params=sampling)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_ids_are_those_of_model_generate(family: str, engine: GenerateEngine, penalty: float) -> None:
    model: Any = make_model(family)
    config = GenerationConfig(
        max_new_tokens=ROOM, decoder_start_token_id=model.generation_config.decoder_start_token_id, pad_token_id=0,
        repetition_penalty=penalty, eos_token_id=EOS,
    )  # fmt: skip
    expected = model.generate(torch.tensor([PROMPT]), generation_config=config)[0, 1:].tolist()
    assert run(engine, request(repetition_penalty=penalty, ignore_eos=False))[1] == expected


@pytest.mark.parametrize(
    "params", [{}, {"do_sample": True, "temperature": 1.5, "seed": 11}, {"frequency_penalty": 1.0}, {"logprobs": True}]
)
def test_an_answer_can_be_taken_up(engine: GenerateEngine, params: dict[str, Any]) -> None:
    whole = run(engine, request(**params))[1]
    assert len(whole) == ROOM
    for cut in (1, 7):
        assert run(engine, request(output=tuple(whole[:cut]), **params))[1] == whole[cut:]


def test_its_end_cannot_be_drawn_before_min_new_tokens(engine: GenerateEngine) -> None:
    first = run(engine, request())[1][0]
    stopped = {"stop_token_ids": (first,), "ignore_eos": False}
    assert run(engine, request(**stopped))[1] == [first]
    assert first not in run(engine, request(min_new_tokens=4, **stopped))[1][:4]


def test_an_answer_that_is_cut_off_is_given_no_end_of_the_models_own() -> None:
    """A forced one, as Bart, Pegasus and Marian have."""
    engine = GenerateEngine(make_model("Bart", forced_eos_token_id=EOS), (EOS,), CONTEXT)
    engine.submit(request(max_new_tokens=1, ignore_eos=False))
    (output,) = engine.step()
    assert output.finish_reason is FinishReason.LENGTH and output.token_ids != (EOS,)


def test_an_answer_ends_where_the_decoders_positions_end() -> None:
    sizes = {"max_encoder_position_embeddings": CONTEXT, "max_decoder_position_embeddings": ROOM, "attention_window": 8}
    engine = GenerateEngine(make_model("LED", **FAMILIES["Bart"], **sizes), (EOS,), CONTEXT)
    assert len(run(engine, request(max_new_tokens=ROOM + 1))[1]) == ROOM


def test_an_abort_ends_the_encoder_before_its_next_layer(family: str) -> None:
    model = make_model(family)
    entered, go_on, layers = threading.Event(), threading.Event(), []
    engine = GenerateEngine(model, (EOS,), CONTEXT)

    def hold(layer: object, *_: object) -> None:
        layers.append(layer)
        entered.set()
        assert go_on.wait(10)

    encoder: Any = model.get_encoder()
    for layer in encoder.block if family == "T5" else encoder.layers:
        layer.register_forward_pre_hook(hold)
    engine.submit(request(1))
    assert entered.wait(10)
    engine.abort(1)
    go_on.set()
    run(engine, request(2, max_new_tokens=1))
    assert len(layers) == 1 + 2  # one of the aborted, both of the next request


def test_the_log_says_why_batching_does_not_serve_it(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model(family)
    assert build_engine(ModelSettings(), model, info_of(model))[0] == "generate"
    assert "it is an encoder-decoder" in caplog.text


def test_an_id_to_begin_with_may_be_a_list_of_one() -> None:
    """For each sequence of a batch one, as in transformers."""
    expected = run(GenerateEngine(make_model("T5"), (EOS,), CONTEXT), request())[1]
    model = make_model("T5")
    model.generation_config.decoder_start_token_id = [0]
    assert run(GenerateEngine(model, (EOS,), CONTEXT), request())[1] == expected


def test_without_an_id_to_begin_with_it_is_refused() -> None:
    with pytest.raises(StartupError, match="no decoder_start_token_id"):
        GenerateEngine(make_model("T5", decoder_start_token_id=None), (EOS,), CONTEXT)
