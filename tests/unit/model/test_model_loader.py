"""A model folder loaded: what the gateway is told about it."""

from __future__ import annotations

import json
import math
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    MllamaConfig,
    MllamaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    dynamic_module_utils,
)

from parleyd.config import ModelSettings
from parleyd.generation import ModelInfo, SamplingDefaults
from parleyd.model.generation_config import max_context_tokens, read_defaults
from parleyd.model.loader import LoadedModel, load_model
from tests.support.tiny_gguf import CONTEXT
from tests.support.tiny_tokenizer import IM_END, IM_END_ID, VOCAB_SIZE, write_tiny_tokenizer
from tests.unit.model.conftest import EMBEDDING_ROWS, edit_json, write_llama


def load(folder: Path, **settings: Any) -> LoadedModel:
    return load_model(ModelSettings(model=str(folder), device_map="cpu", **settings))


def info(folder: Path, **settings: Any) -> ModelInfo:
    return load(folder, **settings).info


def test_a_loaded_model_is_described_and_in_evaluation_mode(llama_folder: Path) -> None:
    loaded = load(llama_folder)
    assert not loaded.model.training
    assert loaded.info == ModelInfo(
        tokenizer_dir=str(llama_folder), max_context_tokens=CONTEXT, vocab_size=EMBEDDING_ROWS,
        eos_token_ids=(IM_END_ID,), dtype="bfloat16", device="cpu", engine="batching", max_running=1,
    )  # fmt: skip


def test_another_architecture_loads_as_well(tmp_path: Path) -> None:
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=77, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    described = info(write_tiny_tokenizer(tmp_path))
    assert (described.max_context_tokens, described.vocab_size, described.dtype) == (77, VOCAB_SIZE, "float32")


def test_of_an_encoder_decoder_both_halves_load(tmp_path: Path) -> None:
    config = T5Config(vocab_size=VOCAB_SIZE, d_model=32, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    loaded = load(write_tiny_tokenizer(tmp_path))
    assert isinstance(loaded.model, T5ForConditionalGeneration)
    assert (loaded.info.max_context_tokens, loaded.info.vocab_size) == (1_000_000, VOCAB_SIZE)
    edit_json(tmp_path / "tokenizer_config.json", model_max_length=10**30)  # so transformers writes "no limit"
    assert info(tmp_path).max_context_tokens == 32_768


def test_ids_without_a_logit_are_none_of_the_vocabulary(tmp_path: Path) -> None:
    """Llama 3.2 Vision's embedding has eight more rows than its head, for images."""
    text = {
        "vocab_size": VOCAB_SIZE, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "cross_attention_layers": [1],
        "max_position_embeddings": CONTEXT, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_global_layers": 1,
        "attention_heads": 2, "vision_output_dim": 32, "intermediate_layers_indices": [0], "image_size": 28,
    }  # fmt: skip
    model = MllamaForConditionalGeneration(MllamaConfig(text_config=text, vision_config=vision))
    assert model.get_input_embeddings().weight.shape[0] == VOCAB_SIZE + 8
    model.save_pretrained(tmp_path)
    assert info(write_tiny_tokenizer(tmp_path)).vocab_size == VOCAB_SIZE


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dtype_overrides_the_checkpoint(llama_folder: Path, dtype: str) -> None:
    loaded = load(llama_folder, dtype=dtype)
    assert loaded.info.dtype == dtype
    assert loaded.model.get_input_embeddings().weight.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_implementation_is_passed_on(llama_folder: Path, attention: str) -> None:
    assert load(llama_folder, attn_implementation=attention).model.config._attn_implementation == attention


def test_pickled_weights_load_where_they_are_allowed(llama_folder: Path) -> None:
    expected = load(llama_folder).model.state_dict()
    torch.save(expected, llama_folder / "pytorch_model.bin")
    (llama_folder / "model.safetensors").unlink()
    loaded = load(llama_folder, allow_pickle=True).model.state_dict()
    assert all(torch.equal(loaded[name], weights) for name, weights in expected.items())


def test_defaults_are_only_what_generation_config_sets(llama_folder: Path) -> None:
    given = {"temperature": 0.7, "top_k": 20, "do_sample": True, "num_return_sequences": 2}
    edit_json(llama_folder / "generation_config.json", **given, max_length=33)
    assert info(llama_folder).defaults == SamplingDefaults(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("temperature", -1.0, "0 to 10"),
        ("temperature", math.nan, "0 to 10"),
        ("top_p", 0.0, "above 0 to 1"),
        ("top_k", -1, "0 to 4294967295"),
        ("repetition_penalty", 0, "above 0 to 10"),
        ("max_new_tokens", 0, "1 to 4294967295"),
    ],
)
def test_a_default_that_no_request_may_have_is_told_and_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, value: float, allowed: str
) -> None:
    edit_json(tmp_path / "generation_config.json", **{name: value}, do_sample=False, min_p=0.5)
    assert read_defaults(tmp_path) == SamplingDefaults(do_sample=False, min_p=0.5)
    expected = f"{tmp_path / 'generation_config.json'}: {name} is {value}, not {allowed}: it is ignored"
    assert [record.getMessage() for record in caplog.records] == [expected]


def test_defaults_that_switch_something_off_stay_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = {"do_sample": False, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0, "repetition_penalty": 1.0}
    edit_json(tmp_path / "generation_config.json", **given, min_new_tokens=0, num_return_sequences=1)
    expected = SamplingDefaults(**given, min_new_tokens=0, num_return_sequences=1)  # type: ignore[arg-type]
    assert read_defaults(tmp_path) == expected
    assert not caplog.records


@pytest.mark.parametrize("given", ["END", ["END"]])
def test_a_models_stop_strings_are_one_or_several(llama_folder: Path, given: str | list[str]) -> None:
    edit_json(llama_folder / "generation_config.json", stop_strings=given)
    assert info(llama_folder).defaults.stop_strings == ("END",)


def test_a_model_without_generation_config_sets_no_defaults(llama_folder: Path) -> None:
    (llama_folder / "generation_config.json").unlink()
    described = info(llama_folder)
    assert described.defaults == SamplingDefaults()
    assert described.eos_token_ids == (IM_END_ID,)


@pytest.mark.parametrize("ids", [5, [5], [5, 9, 5]])
def test_generation_config_names_the_ids_that_end_an_answer(llama_folder: Path, ids: int | list[int]) -> None:
    edit_json(llama_folder / "generation_config.json", eos_token_id=ids)
    assert info(llama_folder).eos_token_ids == tuple(dict.fromkeys([ids] if isinstance(ids, int) else ids))


def test_an_end_of_which_there_is_no_logit_is_none(llama_folder: Path) -> None:
    edit_json(llama_folder / "generation_config.json", eos_token_id=[EMBEDDING_ROWS, 5, -1])
    assert info(llama_folder).eos_token_ids == (5,)


@pytest.mark.parametrize(
    ("name", "end", "token_id"),
    [
        ("tokenizer_config.json", IM_END, IM_END_ID),
        ("tokenizer_config.json", {"content": "<end>", "special": True, "__type": "AddedToken"}, VOCAB_SIZE),
        ("special_tokens_map.json", IM_END, IM_END_ID),
        ("special_tokens_map.json", None, None),
    ],
)
def test_the_tokenizer_names_the_end_where_nothing_else_does(
    llama_folder: Path, name: str, end: object, token_id: int | None
) -> None:
    edit_json(llama_folder / "generation_config.json", eos_token_id=None)
    config = json.loads((llama_folder / "config.json").read_text())
    (llama_folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    edit_json(llama_folder / "tokenizer_config.json", eos_token=None)
    edit_json(llama_folder / name, eos_token=end)
    assert info(llama_folder).eos_token_ids == (() if token_id is None else (token_id,))


def test_a_context_without_end_is_one_that_requests_can_name(llama_folder: Path) -> None:
    edit_json(llama_folder / "config.json", max_position_embeddings=2**40)
    assert info(llama_folder).max_context_tokens == 2**32 - 1


@pytest.mark.parametrize(
    ("config", "of_tokenizer", "context"),
    [({"n_ctx": 77}, 512, 77), ({"n_ctx": 0}, 512, 512), ({}, 10**30, 32_768), ({}, 0, 32_768), ({}, "512", 32_768)],
)
def test_a_context_of_which_the_configuration_tells_nothing_is_the_tokenizers_or_a_default(
    tmp_path: Path, config: dict[str, int], of_tokenizer: object, context: int
) -> None:
    edit_json(tmp_path / "tokenizer_config.json", model_max_length=of_tokenizer)
    assert max_context_tokens(SimpleNamespace(**config), tmp_path) == context


def test_a_local_folder_is_loaded_without_network(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError(f"connects to {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load(llama_folder)


def test_loading_writes_progress_to_stderr_and_nothing_to_stdout(
    llama_folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    edit_json(llama_folder / "generation_config.json", do_sample=False, temperature=0.5)  # transformers warns of this
    load(llama_folder)
    out, err = capfd.readouterr()
    assert out == ""
    assert "Loading weights" in err
    assert "warn" not in err.lower()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_an_adapter_beside_the_weights_that_is_left_out_is_told(
    llama_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_json(llama_folder / "adapter_config.json", base_model_name_or_path="org/base")
    load(llama_folder)
    assert "peft" in caplog.text


def test_code_of_its_own_counts_also_where_transformers_knows_the_kind_as_one_that_sees(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    code = """from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "llava"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
    (llama_folder / "own.py").write_text(code)
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit_json(llama_folder / "config.json", model_type="llava", auto_map=auto_map)
    assert type(load(llama_folder, trust_remote_code=True).model).__name__ == "OwnModel"


def test_sharded_weights_load(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_llama(tmp_path / "one")
    AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two", max_shard_size="20KB")
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 1
    assert info(write_tiny_tokenizer(tmp_path / "two")).vocab_size == EMBEDDING_ROWS
