"""A tiny .gguf file, made without network or weights."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np

from tests.support.tiny_tokenizer import CHATML_TEMPLATE, IM_END_ID, IM_START_ID, VOCAB_SIZE, write_tiny_tokenizer

CONTEXT, HIDDEN, LAYERS = 96, 32, 2


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    leave_out: str | None = None,
    matrices: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    tensors_of_part: int = 0,
) -> Path:
    """A random Llama in float32 with a byte vocabulary of three special tokens, as llama.cpp writes it.

    `matrices`: the type of the decoder layers' matrices. `tensors_of_part`: in parts of so many, named after `path`.
    """
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_of_part)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
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
