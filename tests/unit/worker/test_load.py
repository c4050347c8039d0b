"""From settings to a warm engine."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from parleyd.config import ModelSettings
from parleyd.errors import StartupError
from parleyd.worker.load import load
from tests.support.tiny_folder import settings_of, write_model
from tests.support.tiny_models import CONTEXT, SIZES, oracle, prompts, request, run
from tests.support.tiny_tokenizer import VOCAB_SIZE, write_tiny_tokenizer

# What a KV cache of 100 tokens takes, in GiB.
_KV_CACHE = 100 * 2 * 2 * 2 * 8 * 4 / 2**30


@pytest.mark.parametrize("engine", ["batching", "generate"])
def test_a_context_can_be_shorter_than_the_models_own(tmp_path: Path, engine: str) -> None:
    folder = write_model(tmp_path / "model", "Llama")
    settings = settings_of(folder, tmp_path / "cache", engine=engine, max_context_tokens=32, kv_cache_memory=_KV_CACHE)
    for _ in range(2):  # the second start may be another way
        built, info = load(settings)
        assert (info.engine, info.max_context_tokens) == (engine, 32)
        ids = run(built, request(1, (5,) * 20, max_new_tokens=50, ignore_eos=True))[1]
        assert len(ids) == 12


def test_a_kv_cache_that_is_too_small_is_refused_with_what_asks_for_less(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "Llama")
    with pytest.raises(StartupError, match="--max-context-tokens asks for less"):
        load(settings_of(folder, tmp_path / "cache", kv_cache_memory=_KV_CACHE))


def test_the_log_says_that_a_cpu_is_slow_in_float16(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_model(tmp_path / "model", "Llama")
    for dtype in ("bfloat16", "float16"):
        assert "--dtype bfloat16 is faster" not in caplog.text
        load(settings_of(folder, tmp_path / "cache", dtype=dtype))
    assert "--dtype bfloat16 is faster" in caplog.text


@pytest.mark.parametrize(("num_contexts_free", "is_served"), [(2.1, True), (1.9, False)])
def test_by_default_one_context_may_take_half_of_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_contexts_free: float, is_served: bool
) -> None:
    settings = settings_of(write_model(tmp_path / "model", "Llama"), tmp_path / "cache")
    context = CONTEXT * _KV_CACHE / 100 * 2**30
    monkeypatch.setattr("parleyd.worker.build.free_bytes", lambda device: int(context * num_contexts_free))
    with nullcontext() if is_served else pytest.raises(StartupError, match="one full context"):
        load(settings)


def test_a_model_that_batching_cannot_drive_has_the_other_engine_at_each_start(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "Llama")
    (folder / "generation_config.json").write_text('{"suppress_tokens": [5]}')
    settings = settings_of(folder, tmp_path / "cache")
    assert [load(settings)[1].engine for _ in range(2)] == ["generate", "generate"]


def test_no_context_is_longer_than_the_models_own(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "Llama")
    with pytest.raises(StartupError, match=f"--max-context-tokens: the model's context holds {CONTEXT}, not 1000"):
        load(settings_of(folder, tmp_path / "cache", max_context_tokens=1000))


@pytest.mark.parametrize("limit", [None, CONTEXT])
def test_without_a_lower_limit_the_context_is_the_models_own(tmp_path: Path, limit: int | None) -> None:
    folder = write_model(tmp_path / "model", "Llama")
    settings: ModelSettings = settings_of(folder, tmp_path / "cache", max_context_tokens=limit)
    assert load(settings)[1].max_context_tokens == CONTEXT


_EYES = {"hidden_size": 16, "intermediate_size": 16}
_SMALL_EYES = {**_EYES, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
_QWEN_EYES = {**_EYES, "depth": 1, "num_heads": 2, "out_hidden_size": 32}
_QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}


@pytest.mark.parametrize("engine", ["batching", "generate"])
@pytest.mark.parametrize(
    ("family", "text", "vision"),
    [
        ("Llava", {"model_type": "llama"}, {"model_type": "clip_vision_model", **_SMALL_EYES}),
        ("Mistral3", {"model_type": "mistral", "sliding_window": None}, {"model_type": "pixtral", **_SMALL_EYES}),
        ("Qwen2_5_VL", {"rope_parameters": _QWEN_ROPE}, _QWEN_EYES),
        ("Qwen3VL", {"rope_parameters": _QWEN_ROPE}, {**_QWEN_EYES, "deepstack_visual_indexes": [0]}),
    ],
)
def test_models_that_see_answer_texts(
    tmp_path: Path, engine: str, family: str, text: dict[str, Any], vision: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    text = {**SIZES, "vocab_size": VOCAB_SIZE, "head_dim": 8, **text}
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=vision)
    model: PreTrainedModel = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    model.save_pretrained(tmp_path / "model")
    folder = write_tiny_tokenizer(tmp_path / "model")
    some = prompts(4)
    built, info = load(settings_of(folder, tmp_path / "cache", engine=engine, dtype="float32"))
    assert info.engine == engine
    answers = run(built, *(request(key, prompt) for key, prompt in enumerate(some)))
    assert [answers[key] for key in range(4)] == [oracle(model, prompt) for prompt in some]
