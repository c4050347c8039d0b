"""Which engine a model gets, and how much memory for its KV cache."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import transformers
from transformers import Gemma4ForCausalLM, Gemma4TextConfig, Llama4ForCausalLM, Llama4TextConfig

from parleyd.config import ModelSettings
from parleyd.engine import stock_forward
from parleyd.engine.generate import GenerateEngine
from parleyd.errors import StartupError
from parleyd.kernels.layout import attend
from parleyd.model.lean_model import can_be_lean
from parleyd.scheduling.prefill_budget import PrefillBudget
from parleyd.worker import build
from parleyd.worker.build import build_engine
from parleyd.worker.obstacle import batching_obstacle
from tests.support.tiny_models import (
    CONTEXT,
    FAMILIES,
    LEAN,
    SIZES,
    info_of,
    make_model,
    oracle,
    prompts,
    request,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tested_families_are_served_by_batching(family: str) -> None:
    model = make_model(family)
    assert can_be_lean(model) == (family in LEAN)
    name, _ = build_engine(ModelSettings(), model, info_of(model))
    assert name == "batching"


class OtherLinear(torch.nn.Linear):
    pass


@pytest.mark.parametrize("what", ["activation", "kind of a layer", "quantizer", "device"])
def test_layers_that_the_lean_ones_would_compute_otherwise_are_not_lean(what: str) -> None:
    model = make_model("Llama", hidden_act="gelu" if what == "activation" else "silu")
    if what == "kind of a layer":
        model.model.layers[1].mlp.up_proj.__class__ = OtherLinear
    elif what == "quantizer":
        model.hf_quantizer = object()
    elif what == "device":
        model.lm_head.to("meta")
    assert not can_be_lean(model)


@pytest.mark.parametrize(
    ("family", "config", "why"),
    [
        ("Mistral", {"sliding_window": 64}, "sliding"),
        ("Gemma2", {"head_dim": 16, "sliding_window": 64}, "sliding"),
        ("Gemma2", {"head_dim": 16, "layer_types": ["full_attention"] * 2}, "soft-capped"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary"),
        ("Mamba", {"state_size": 8, "num_key_value_heads": None}, "state"),
    ],
)
def test_what_batching_cannot_drive_is_served_by_generate_with_the_reason_logged(
    family: str, config: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(family, **config)
    name, engine = build_engine(ModelSettings(), model, info_of(model))
    assert name == "generate" and isinstance(engine, GenerateEngine)
    assert why in (batching_obstacle(model) or "") and why in caplog.text


@pytest.mark.parametrize(
    ("name", "value"), [("no_repeat_ngram_size", 2), ("suppress_tokens", [5]), ("sequence_bias", [[[7], 9.0]])]
)
def test_what_a_generation_config_asks_of_logits_is_done_by_generate(name: str, value: Any) -> None:
    model = make_model("Llama")
    assert batching_obstacle(model) is None
    setattr(model.generation_config, name, value)
    assert build_engine(ModelSettings(), model, info_of(model))[0] == "generate"


def test_what_a_generation_config_switches_off_is_no_obstacle() -> None:
    model = make_model("Llama")
    model.generation_config.update(suppress_tokens=[], typical_p=1.0, no_repeat_ngram_size=0)
    assert batching_obstacle(model) is None


def test_windows_that_are_switched_off_are_no_obstacle() -> None:
    model = make_model("Llama")
    model.config.sliding_window, model.config.use_sliding_window = 64, False
    assert batching_obstacle(model) is None


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_change_in_one_type_of_layer_are_an_obstacle(kind: str) -> None:
    model = make_model("Llama")
    model.config.rope_parameters = {"full_attention": {"rope_type": kind, "rope_theta": 1e4}}
    assert "rotary" in (batching_obstacle(model) or "")


def test_a_model_on_several_devices_is_an_obstacle() -> None:
    model = make_model("Llama")
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    assert "several devices" in (batching_obstacle(model) or "")


def test_layers_that_count_positions_themselves_are_an_obstacle() -> None:
    """Llama 4's do, from 8,192 tokens on: no check of the logits would tell."""
    config = Llama4TextConfig(**SIZES, head_dim=8, num_local_experts=2, layer_types=["full_attention"] * 2)
    assert "positions" in (batching_obstacle(Llama4ForCausalLM(config)) or "")


def test_layers_that_differ_are_an_obstacle() -> None:
    """Gemma 4's do where all have full attention. Its configuration raises where it is asked for what differs."""
    config = Gemma4TextConfig(**SIZES, head_dim=8, layer_types=["full_attention"] * 2, vocab_size_per_layer_input=97)
    model = Gemma4ForCausalLM(config)
    assert "layers that differ" in (batching_obstacle(model) or "")
    assert build_engine(ModelSettings(), model, info_of(model))[0] == "generate"


def test_a_model_with_windows_and_without_a_longest_context_is_served_by_generate() -> None:
    model = make_model("RecurrentGemma", head_dim=8, block_types=["recurrent", "attention"])
    del model.config.max_position_embeddings
    assert build_engine(ModelSettings(), model, info_of(model))[0] == "generate"


def test_an_attention_implementation_that_has_no_effect_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model("Llama")
    build_engine(ModelSettings(attn_implementation="eager"), model, info_of(model))
    assert "--attn-implementation" in caplog.text


def test_on_a_cpu_float16_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    for dtype, is_warned_of in ((torch.float32, False), (torch.float16, True)):
        model = make_model("Llama", dtype)
        build_engine(ModelSettings(), model, info_of(model))
        assert ("--dtype bfloat16 is faster" in caplog.text) == is_warned_of


@pytest.mark.parametrize(
    ("settings", "max_running"), [({}, 64), ({"max_running": 3}, 3), ({"max_running": 99, "max_batch_tokens": 16}, 16)]
)
def test_no_more_run_than_are_wanted_and_a_step_has_tokens_for(settings: dict[str, int], max_running: int) -> None:
    model = make_model("Llama")
    _, engine = build_engine(ModelSettings(**settings), model, info_of(model))  # type: ignore[arg-type]
    assert engine.max_running == max_running


def test_layers_that_never_ask_for_our_attention_are_found_out(caplog: pytest.LogCaptureFixture) -> None:
    """Alone and in one step they compute the right thing, by themselves."""
    model = make_model("DiffLlama", head_dim=8)
    assert batching_obstacle(model) is None
    expected = oracle(model, (5, 17, 42))
    name, engine = build_engine(ModelSettings(), model, info_of(model))
    assert name == "generate" and "it computes something else" in caplog.text
    engine.submit(request(1, (5, 17, 42)))
    outputs = engine.step()
    while not outputs[-1].is_last:
        outputs += engine.step()
    assert [token_id for output in outputs for token_id in output.token_ids] == expected


@pytest.mark.skipif(not hasattr(transformers, "FlintConfig"), reason="this transformers has no Flint")
def test_attention_sinks_are_found_out_where_they_change_little() -> None:
    model = make_model("Flint", head_dim=8, layer_types=["full_attention"] * 2, sliding_window=CONTEXT)
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-2.0)
    assert batching_obstacle(model) is None
    assert build_engine(ModelSettings(), model, info_of(model))[0] == "generate"


def test_attention_to_what_follows_is_found_out_where_it_changes_little() -> None:
    model = make_model("RoCBert", num_key_value_heads=None)
    for layer in model.roc_bert.encoder.layer:
        layer.attention.output.dense.weight.data *= 0.02
    assert batching_obstacle(model) is None
    assert build_engine(ModelSettings(), model, info_of(model))[0] == "generate"


@pytest.mark.parametrize(("dtype", "engine"), [(torch.float32, "generate"), (torch.bfloat16, "batching")])
def test_in_float32_what_differs_a_little_is_found_out(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, engine: str
) -> None:
    monkeypatch.setattr(stock_forward, "attend", lambda *arguments: 1.02 * attend(*arguments))
    model = make_model("Gemma", dtype)
    settings = ModelSettings(cpu_kernels=False)
    assert build_engine(settings, model, info_of(model))[0] == engine


def test_on_a_cpu_the_budget_of_prompts_learns_what_each_step_was_of(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(PrefillBudget, "observe", lambda _, decodes, prefill, seconds: told.append((decodes, prefill)))
    model = make_model("Llama")
    _, engine = build_engine(ModelSettings(), model, info_of(model))
    engine.submit(request(1, tuple(range(4, 14)), max_new_tokens=3, ignore_eos=True))
    for _ in range(3):
        engine.step()
    assert told == [(0, 10), (1, 0), (1, 0)]


def test_a_kv_cache_that_does_not_hold_one_full_context_is_refused() -> None:
    model = make_model("Llama")
    with pytest.raises(StartupError, match="--kv-cache-memory: one full context of 256 tokens"):
        build_engine(ModelSettings(kv_cache_memory=0.00001), model, info_of(model))


def test_a_kv_cache_of_more_than_is_free_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As large as all requests that may run can fill, that is: what nobody can use is not taken."""
    model = make_model("Llama")
    blocks_of_context, block_bytes = CONTEXT // 32, 2 * 2 * 32 * 2 * 8 * 4
    wanted = 64 * blocks_of_context * block_bytes
    monkeypatch.setattr(build, "free_bytes", lambda device: wanted - 1)
    with pytest.raises(StartupError, match=r"--kv-cache-memory: a KV cache of .* GiB, and only .* GiB are free"):
        build_engine(ModelSettings(kv_cache_memory=100.0), make_model("Llama"), info_of(model))
    monkeypatch.setattr(build, "free_bytes", lambda device: wanted)
    assert build_engine(ModelSettings(kv_cache_memory=100.0), model, info_of(model))[0] == "batching"


@pytest.mark.parametrize(("num_free", "num_held"), [(8, 2), (3, 1), (2, 1), (1000, 64)])
def test_a_kv_cache_takes_a_quarter_of_what_is_free_or_one_context_where_that_is_at_most_half(
    num_free: int, num_held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In full contexts."""
    blocks_of_context, block_bytes = CONTEXT // 32, 2 * 2 * 32 * 2 * 8 * 4
    context_bytes = blocks_of_context * block_bytes
    monkeypatch.setattr(build, "free_bytes", lambda device: num_free * context_bytes)
    model = make_model("Llama")
    _, engine = build_engine(ModelSettings(), model, info_of(model))
    assert engine.stats().num_blocks == num_held * blocks_of_context
    monkeypatch.setattr(build, "free_bytes", lambda device: 2 * context_bytes - 1)
    with pytest.raises(StartupError, match="one full context"):
        build_engine(ModelSettings(), make_model("Llama"), info_of(model))


def test_a_files_own_numbers_are_held_where_there_is_room_for_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "free_bytes", lambda device: 2**30)
    for num_bytes, settings, are_held in (
        (2**28, ModelSettings(), True),
        (2**28, ModelSettings(four_bit_linear=False), False),
        (2**28 + 1, ModelSettings(), False),
    ):
        assert "too little memory" not in caplog.text
        model = make_model("Llama")
        blocks = MagicMock(num_bytes=num_bytes, numbers_of=MagicMock(return_value=None))
        build_engine(settings, model, info_of(model), blocks)
        assert blocks.numbers_of.called == are_held
    assert "too little memory" in caplog.text


def test_either_engine_and_layers_can_be_asked_for() -> None:
    model = make_model("Llama")
    prompt = prompts(1)[0]
    expected = oracle(make_model("Llama"), prompt)
    choices: list[dict[str, Any]] = [{"lean_layers": False}, {"packed_linear": False}, {"engine": "generate"}]
    for settings in (ModelSettings(**choice) for choice in choices):
        _, engine = build_engine(settings, make_model("Llama"), info_of(model))
        engine.submit(request(1, prompt))
        ids: list[int] = []
        while True:
            outputs = engine.step()
            ids += [token_id for output in outputs for token_id in output.token_ids]
            if outputs[-1].is_last:
                break
        assert ids == expected
