"""Tiny models in folders and a tiny .gguf file, made here: no network, no downloaded weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from parleyd.config import ModelSettings
from parleyd.errors import StartupError
from parleyd.model.loader import load_model
from tests.support.tiny_tokenizer import CHATML_TEMPLATE, IM_END_ID, IM_START_ID, VOCAB_SIZE, write_tiny_tokenizer

EMBEDDING_ROWS, CONTEXT, HIDDEN, LAYERS = 264, 96, 32, 2
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


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    leave_out: str | None = None,
    matrices: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """A random Llama in float32 with a byte vocabulary of three special tokens, as llama.cpp writes it.

    `matrices`: the type of the decoder layers' matrices.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    vocabulary = json.loads((write_tiny_tokenizer(path.parent / "tokenizer") / "tokenizer.json").read_text())
    tokens = [*vocabulary["model"]["vocab"], *(token["content"] for token in vocabulary["added_tokens"]), "hi", "hih"]
    assert len(tokens) == VOCAB_SIZE + 2
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 2)
    writer.add_token_merges(["h i", "hi h"])
    writer.add_bos_token_id(IM_START_ID)
    writer.add_eos_token_id(IM_END_ID)
    writer.add_pad_token_id(IM_END_ID)
    writer.add_chat_template(CHATML_TEMPLATE)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm": (HIDDEN,), f"blk.{layer}.ffn_norm": (HIDDEN,),
            f"blk.{layer}.attn_q": (HIDDEN, HIDDEN), f"blk.{layer}.attn_k": (HIDDEN // 2, HIDDEN),
            f"blk.{layer}.attn_v": (HIDDEN // 2, HIDDEN), f"blk.{layer}.attn_output": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_gate": (64, HIDDEN), f"blk.{layer}.ffn_up": (64, HIDDEN),
            f"blk.{layer}.ffn_down": (HIDDEN, 64),
        }  # fmt: skip
    for name, shape in shapes.items():
        if name != leave_out:
            kind = matrices if len(shape) == 2 and "blk" in name else gguf.GGMLQuantizationType.F32
            values = gguf.quantize(random.normal(size=shape).astype(np.float32), kind)
            writer.add_tensor(f"{name}.weight", values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")
