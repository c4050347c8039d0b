"""The second start of a model: without transformers, and with the very same weights and tables."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from parleyd.config import ModelSettings
from parleyd.generation import ModelInfo
from parleyd.model import lean_start
from parleyd.model.files import find_files
from parleyd.model.lean_model import LeanModel, lean_weights
from parleyd.model.loader import LoadedModel, load_model
from tests.support.tiny_folder import settings_of, write_model
from tests.support.tiny_gguf import write_gguf
from tests.support.tiny_models import LEAN
from tests.unit.model.conftest import edit_json, folders

LLAMA_3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


def first_start(settings: ModelSettings) -> LoadedModel:
    """As the worker's."""
    assert recall(settings) is None
    files = find_files(settings)
    loaded = load_model(settings, files)
    if (place := lean_start.place_of(settings, files)) is not None:
        lean_start.remember(place, files, loaded.model, loaded.info)
    return loaded


def recall(settings: ModelSettings) -> tuple[LeanModel, ModelInfo] | None:
    files = find_files(settings)
    place = lean_start.place_of(settings, files)
    return None if place is None else lean_start.recall(place, files)


def place_of(settings: ModelSettings) -> Path:
    place = lean_start.place_of(settings, find_files(settings))
    assert place is not None
    return place


def assert_recalled(settings: ModelSettings, loaded: LoadedModel) -> None:
    recalled = recall(settings)
    assert recalled is not None
    model, info = recalled
    assert info == loaded.info
    expected = lean_weights(loaded.model)
    assert model.weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert weight.dtype == model.weights[name].dtype
        assert torch.equal(weight, model.weights[name]), name
    assert_same_tables(model, loaded.model)


def assert_same_tables(model: LeanModel, theirs: PreTrainedModel) -> None:
    positions = torch.arange(theirs.config.max_position_embeddings)[None]
    cos, sin = theirs.model.rotary_emb(model.embedding, positions)
    half = cos.shape[-1] // 2
    ours_cos, ours_sin = (table[:, 0] for table in model.rotary_tables())
    assert torch.equal(ours_cos, cos[0])
    assert torch.equal(ours_sin[:, half:], sin[0, :, half:])
    assert torch.equal(ours_sin[:, :half], -sin[0, :, :half])


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("family", LEAN)
def test_it_is_the_model_that_transformers_loads(tmp_path: Path, family: str, dtype: str) -> None:
    settings = settings_of(write_model(tmp_path / "model", family), tmp_path / "cache", dtype=dtype)
    assert_recalled(settings, first_start(settings))


@pytest.mark.parametrize("rope", [LLAMA_3_ROPE, YARN_ROPE], ids=["llama3", "yarn"])
def test_scaled_rotary_embeddings(tmp_path: Path, rope: dict[str, Any]) -> None:
    settings = settings_of(write_model(tmp_path / "model", "Llama", rope_parameters=rope), tmp_path / "cache")
    assert_recalled(settings, first_start(settings))


def test_a_tied_embedding_and_weights_in_several_files(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "Llama", tie_word_embeddings=True, shards="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    settings = settings_of(folder, tmp_path / "cache")
    assert_recalled(settings, first_start(settings))


def test_a_gguf_file(tmp_path: Path) -> None:
    settings = settings_of(write_gguf(tmp_path / "a.gguf", matrices=GGMLQuantizationType.Q4_1), tmp_path / "cache")
    assert_recalled(settings, first_start(settings))


@pytest.mark.parametrize("change", ["config.json", "generation_config.json", "model.safetensors"])
def test_whatever_changes_is_read_anew(tmp_path: Path, change: str) -> None:
    folder = write_model(tmp_path / "model", "Llama")
    settings = settings_of(folder, tmp_path / "cache")
    first_start(settings)
    if change.endswith(".json"):
        before = (folder / change).stat()
        edit_json(folder / change, eos_token_id=7)
        os.utime(folder / change, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        (folder / change).touch()
    loaded = first_start(settings)
    assert_recalled(settings, loaded)


def test_a_full_disk_is_left_as_it_was(tmp_path: Path) -> None:
    settings = settings_of(write_model(tmp_path / "model", "Llama"), tmp_path / "cache")
    place, files, loaded = place_of(settings), find_files(settings), load_model(settings)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))  # fails writes as a full disk does
    try:
        lean_start.remember(place, files, loaded.model, loaded.info)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert folders(tmp_path / "cache") == []


def test_a_file_that_leads_nowhere_is_passed_over(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "Llama")
    (folder / "lost.json").symlink_to(tmp_path / "nowhere")
    settings = settings_of(folder, tmp_path / "cache")
    assert_recalled(settings, first_start(settings))


@pytest.mark.parametrize("broken", [b"", b'{"names":["\xff"]}', b'{"info": 1}'])
def test_a_broken_memory_is_made_anew(tmp_path: Path, broken: bytes) -> None:
    settings = settings_of(write_model(tmp_path / "model", "Llama"), tmp_path / "cache")
    first_start(settings)
    place_of(settings).write_bytes(broken)
    assert_recalled(settings, first_start(settings))


def test_weights_that_cannot_be_read_are_left_to_transformers_to_explain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(write_model(tmp_path / "model", "Llama"), tmp_path / "cache")
    first_start(settings)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("I/O error")

    monkeypatch.setattr(lean_start, "safe_open", fail)
    assert recall(settings) is None


def test_with_an_adapter_it_is_another_model(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "Llama")
    settings = settings_of(folder, tmp_path / "cache")
    first_start(settings)
    (folder / "adapter_config.json").write_text("{}")
    assert recall(settings) is None


def test_pickled_weights_are_not_remembered(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "Llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    first_start(settings_of(folder, tmp_path / "cache", allow_pickle=True))
    assert folders(tmp_path / "cache") == []


@pytest.mark.parametrize(
    "settings",
    [
        {"engine": "generate"}, {"lean_layers": False}, {"attn_implementation": "eager"}, {"trust_remote_code": True},
        {"dtype": "float16"}, {"quantization": "torchao-int8"},
    ],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
def test_other_settings_are_not_answered_from_memory(tmp_path: Path, settings: dict[str, Any]) -> None:
    plain = settings_of(write_model(tmp_path / "model", "Llama"), tmp_path / "cache")
    first_start(plain)
    other = replace(plain, **settings)
    assert recall(other) is None


def test_families_without_lean_layers_are_not_remembered(tmp_path: Path) -> None:
    settings = settings_of(write_model(tmp_path / "model", "Gemma"), tmp_path / "cache")
    first_start(settings)
    assert folders(tmp_path / "cache") == []


def test_weights_that_transformers_changes_as_it_loads_are_not_remembered(tmp_path: Path) -> None:
    settings = settings_of(write_model(tmp_path / "model", "Llama"), tmp_path / "cache")
    files = find_files(settings)
    loaded = load_model(settings, files)
    with torch.no_grad():
        loaded.model.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    lean_start.remember(place_of(settings), files, loaded.model, loaded.info)
    assert folders(tmp_path / "cache") == []


def test_weights_of_several_types_are_not_remembered(tmp_path: Path) -> None:
    settings = settings_of(write_model(tmp_path / "model", "Llama"), tmp_path / "cache", dtype="bfloat16")
    files = find_files(settings)
    loaded = load_model(settings, files)
    loaded.model.model.norm.float()
    lean_start.remember(place_of(settings), files, loaded.model, loaded.info)
    assert folders(tmp_path / "cache") == []


def test_weights_that_transformers_finds_under_other_names_are_not_remembered(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "Llama", tie_word_embeddings=True)
    path = folder / "model.safetensors"
    save_file({name.removeprefix("model."): weight for name, weight in load_file(path).items()}, path, {"format": "pt"})
    first_start(settings_of(folder, tmp_path / "cache"))
    assert folders(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    first_start(settings_of(write_model(tmp_path / "model", "Llama"), tmp_path / "cache"))


def test_transformers_is_not_imported(tmp_path: Path) -> None:
    settings = settings_of(write_model(tmp_path / "model", "Llama"), tmp_path / "cache")
    first_start(settings)
    program = f"""
import sys
from parleyd.config import ModelSettings
from parleyd.worker.load import load
engine, info = load({settings!r})
assert info.engine == "batching"
assert not {{"transformers", "accelerate", "sympy"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
