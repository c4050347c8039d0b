"""Whatever is wrong with a model, the operator reads one line that names it."""

from __future__ import annotations

import errno
import json
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaForSequenceClassification,
    WhisperConfig,
)

from parleyd.model.checkpoint import Checkpoint
from tests.unit.model.conftest import edit_json, startup_error

NESTED = pytest.param('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", id="nested")  # deeper than Python's stack


@pytest.mark.parametrize("model", ["/no/such/folder", "./nothing", "missing.gguf", "one/two/three"])
def test_a_path_that_is_not_there_is_named(model: str) -> None:
    assert startup_error(model) == f"--model {model}: no such file or folder"


def test_an_empty_name_is_not_the_folder_that_the_service_is_started_in(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(llama_folder)
    assert startup_error("") == "--model is empty: name a local folder, a .gguf file or a Hub id"


@pytest.mark.parametrize("asked", ["is_dir", "is_file"])
def test_a_folder_that_may_not_be_entered_is_named(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, asked, refuse)
    message = startup_error(llama_folder)
    assert message.startswith(f"--model {llama_folder}: {llama_folder}")
    assert message.endswith(": Permission denied")


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"x")
    assert "not a .gguf file" in startup_error(path)


def test_a_folder_without_config_is_one_clear_line(tmp_path: Path) -> None:
    assert startup_error(tmp_path) == f"--model {tmp_path}: not a model folder: it has no config.json"


def test_a_lora_adapter_is_to_be_merged(tmp_path: Path) -> None:
    edit_json(tmp_path / "adapter_config.json", base_model_name_or_path="org/base")
    assert "an adapter, such as LoRA, not a model; merge it into org/base" in startup_error(tmp_path)


def test_a_lora_adapter_beside_its_models_configuration_is_one_too(llama_folder: Path) -> None:
    edit_json(llama_folder / "adapter_config.json", base_model_name_or_path="org/base")
    (llama_folder / "model.safetensors").rename(llama_folder / "adapter_model.safetensors")
    assert "an adapter, such as LoRA, not a model; merge it into org/base" in startup_error(llama_folder)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff", NESTED])
def test_a_broken_config_is_named(llama_folder: Path, text: str) -> None:
    (llama_folder / "config.json").write_text(text, encoding="latin-1")
    assert str(llama_folder / "config.json") in startup_error(llama_folder)


def test_an_unknown_kind_of_model_is_named(llama_folder: Path) -> None:
    edit_json(llama_folder / "config.json", model_type="made-up", architectures=None)
    message = startup_error(llama_folder)
    assert "does not know this kind of model" in message
    assert "made-up" in message


def test_architectures_that_are_no_list_name_none(llama_folder: Path) -> None:
    edit_json(llama_folder / "config.json", architectures=5)
    assert Checkpoint.open(llama_folder).config["architectures"] == 5


@pytest.mark.parametrize("text", ["{", NESTED])
def test_a_broken_generation_config_is_named(llama_folder: Path, text: str) -> None:
    (llama_folder / "generation_config.json").write_text(text)
    assert "generation_config.json cannot be read" in startup_error(llama_folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"), ("stop_strings", [1]), ("stop_strings", [""]),
        ("eos_token_id", "x"), ("eos_token_id", [[1]]), ("eos_token_id", float("inf")),
    ],
)  # fmt: skip
def test_a_generation_config_with_a_value_of_the_wrong_kind_is_named(
    llama_folder: Path, name: str, value: object
) -> None:
    edit_json(llama_folder / "generation_config.json", **{name: value})
    assert f"{name} is {value!r}" in startup_error(llama_folder)


@pytest.mark.parametrize("values", [{"max_new_tokens": 0}, {"early_stopping": "soon"}, {"num_return_sequences": 2}])
def test_a_generation_config_that_transformers_does_not_take_is_named(
    llama_folder: Path, values: dict[str, object]
) -> None:
    edit_json(llama_folder / "generation_config.json", **values)
    error = startup_error(llama_folder)
    assert "generation_config.json" in error and next(iter(values)) in error


def test_a_folder_without_weights_is_named(llama_folder: Path) -> None:
    (llama_folder / "model.safetensors").unlink()
    assert "no weights" in startup_error(llama_folder)


def test_pickled_weights_are_refused(llama_folder: Path) -> None:
    (llama_folder / "model.safetensors").rename(llama_folder / "pytorch_model.bin")
    assert "only pickled weights" in startup_error(llama_folder)


class _Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self._path,)


def test_allowed_pickles_still_run_no_code(llama_folder: Path, tmp_path: Path) -> None:
    (llama_folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": _Evil(tmp_path / "ran")}, llama_folder / "pytorch_model.bin")
    assert "cannot be loaded" in startup_error(llama_folder, allow_pickle=True)
    assert not (tmp_path / "ran").exists()
    torch.load(llama_folder / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have worked


@pytest.mark.parametrize("has_config", [True, False])
def test_a_folder_of_gguf_files_points_at_one(llama_folder: Path, has_config: bool) -> None:
    if not has_config:
        (llama_folder / "config.json").unlink()
    (llama_folder / "model.safetensors").rename(llama_folder / "m.gguf")
    assert f"--model {llama_folder / 'm.gguf'}" in startup_error(llama_folder)


def test_missing_shards_are_named_as_far_as_a_line_holds_them(llama_folder: Path) -> None:
    (llama_folder / "model.safetensors").unlink()
    shards = {f"tensor {number}": f"model-{number}.safetensors" for number in range(100, 300)}
    edit_json(llama_folder / "model.safetensors.index.json", weight_map=shards)
    assert "weight files are missing: model-100.safetensors, model-101.safetensors" in startup_error(llama_folder)


@pytest.mark.parametrize("names", [[], ["x"], [1, "x"], [["x"]], ["x" * 5000]])
def test_an_index_of_names_that_no_file_has_is_refused(llama_folder: Path, names: list[object]) -> None:
    (llama_folder / "model.safetensors").unlink()
    edit_json(llama_folder / "model.safetensors.index.json", weight_map=dict(zip("ab", names, strict=False)))
    assert str(llama_folder) in startup_error(llama_folder)


@pytest.mark.parametrize(
    "header",
    [NESTED, '{"a": {"dtype": ["F32"], "shape": [0], "data_offsets": [0, 0]}}', "[1]"],
)
def test_weights_whose_header_is_no_header_are_named(llama_folder: Path, header: str) -> None:
    path = llama_folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    assert str(llama_folder) in startup_error(llama_folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_weights_cut_short_are_named(llama_folder: Path, keep: int) -> None:
    path = llama_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert str(path) in startup_error(llama_folder)


@pytest.mark.parametrize("content", [b"", b"x" * 100])
def test_blocks_that_are_none_are_named(llama_folder: Path, content: bytes) -> None:
    path = llama_folder / "gguf_blocks.safetensors"
    path.write_bytes(content)
    message = startup_error(llama_folder, cache=str(llama_folder.parent))  # as if converted
    assert message.startswith(f"{path} cannot be read: ")


def test_weights_that_lack_a_tensor_are_refused_and_not_made_up(llama_folder: Path) -> None:
    edit_json(llama_folder / "config.json", num_hidden_layers=3)
    assert "lacks weights that the model needs: model.layers.2" in startup_error(llama_folder)


def test_weights_of_another_shape_are_refused(llama_folder: Path) -> None:
    edit_json(llama_folder / "config.json", intermediate_size=48)
    assert "cannot be loaded" in startup_error(llama_folder)


def test_a_classifier_is_refused(llama_folder: Path) -> None:
    LlamaForSequenceClassification.from_pretrained(llama_folder).save_pretrained(llama_folder)
    assert "not a language model but LlamaForSequenceClassification" in startup_error(llama_folder)


def test_a_model_without_a_language_head_is_refused(llama_folder: Path) -> None:
    config = BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    BertModel(config).save_pretrained(llama_folder)
    assert "lacks weights" in startup_error(llama_folder)


def test_what_listens_instead_of_reading_is_refused(llama_folder: Path) -> None:
    WhisperConfig(architectures=["WhisperForConditionalGeneration"]).save_pretrained(llama_folder)
    assert startup_error(llama_folder).endswith(": not a model that generates text from text")


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_the_package_that_reads_a_vocabulary_is_named(llama_folder: Path, tmp_path: Path) -> None:
    (llama_folder / "tokenizer.json").unlink()
    (llama_folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    assert "it needs the Python package sentencepiece" in startup_error(llama_folder, cache=str(tmp_path))


def test_a_folder_without_a_tokenizer_is_named(llama_folder: Path) -> None:
    (llama_folder / "tokenizer.json").unlink()
    assert "it has no tokenizer" in startup_error(llama_folder)


def test_code_that_comes_with_a_model_needs_trust(llama_folder: Path) -> None:
    edit_json(
        llama_folder / "config.json", model_type="made-up", architectures=None,
        auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    )  # fmt: skip
    (llama_folder / "code.py").write_text("raise SystemExit")
    assert "--trust-remote-code" in startup_error(llama_folder)


@pytest.mark.parametrize("device_map", ["nonsense", "cuda:99", "cpu:x", ""])
def test_a_device_that_is_not_there_is_named(llama_folder: Path, device_map: str) -> None:
    assert startup_error(llama_folder, device_map=device_map).startswith(f"--device-map {device_map}: no device")


def test_flash_attention_that_is_not_installed_is_named(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_flash_attn_2_available", lambda: False)
    message = startup_error(llama_folder, attn_implementation="flash_attention_2")
    assert message.startswith("--attn-implementation flash_attention_2: ")


def write_huge_weights(folder: Path, gib: int) -> None:
    """A sparse file that declares a tensor of so many GiB in bfloat16 and takes no room on the disk."""
    num_bytes = gib << 30
    header = json.dumps({"w": {"dtype": "BF16", "shape": [num_bytes // 2], "data_offsets": [0, num_bytes]}}).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(stream.tell() + num_bytes)


@pytest.mark.parametrize(("dtype", "needed"), [("auto", "8192.0"), ("bfloat16", "8192.0"), ("float32", "16384.0")])
def test_too_little_memory_is_told_before_loading(llama_folder: Path, dtype: str, needed: str) -> None:
    write_huge_weights(llama_folder, 8192)
    message = startup_error(llama_folder, dtype=dtype, device_map="cpu")
    assert f"the weights need {needed} GiB of memory, but main memory has " in message
    assert message.count(" GiB") == 2


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_weights_are_measured_in_any_order_and_in_the_type_that_the_configuration_names(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({name: "float32"}))
    tensors = {key: {"dtype": "BF16", "shape": [1], "data_offsets": at} for key, at in (("b", [2, 4]), ("a", [0, 2]))}
    header = json.dumps(tensors).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    (tmp_path / "pytorch_model.bin").write_bytes(b"old")
    checkpoint = Checkpoint.open(tmp_path, allow_pickle=True)
    assert (checkpoint.num_bytes("auto"), checkpoint.is_pickled) == (8, False)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried\nto")])
def test_memory_that_runs_out_while_loading_is_one_line(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    assert "too little memory" in startup_error(llama_folder)
