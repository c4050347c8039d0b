"""Tiny models in folders and in a .gguf file, made here: no network, no downloaded weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from parleyd.config import ModelSettings
from parleyd.errors import StartupError
from parleyd.model.loader import load_model
from tests.support.tiny_gguf import CONTEXT, HIDDEN, LAYERS, write_gguf
from tests.support.tiny_tokenizer import IM_END_ID, IM_START_ID, write_tiny_tokenizer

EMBEDDING_ROWS = 264
MakeFolder = Callable[..., Path]


def write_llama(folder: Path, **config: Any) -> Path:
    """A random Llama in bfloat16 with the tiny tokenizer."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": EMBEDDING_ROWS, "hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
        "bos_token_id": IM_START_ID, "eos_token_id": IM_END_ID,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**settings | config))
    model.bfloat16().save_pretrained(folder)
    return write_tiny_tokenizer(folder)


@pytest.fixture(scope="session")
def _llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture
def llama_folder(_llama: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(_llama, tmp_path / "tiny-llama"))


def edit_json(path: Path, **values: Any) -> None:
    """Sets values in a JSON file; None removes one. The file is made where it is missing."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content |= values
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def folders(cache: Path) -> list[str]:
    """Everything in a cache folder but its lock."""
    return sorted(path.name for path in cache.iterdir() if path.name != ".lock") if cache.exists() else []


def startup_error(model: Path | str, **settings: Any) -> str:
    """The message with which loading fails; fails itself where that is more than a line."""
    with pytest.raises(StartupError) as caught:
        load_model(ModelSettings(model=str(model), **settings))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")
