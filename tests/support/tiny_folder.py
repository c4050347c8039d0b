"""Folders of tiny random models, and the settings that serve them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from parleyd.config import ModelSettings
from tests.support.tiny_models import FAMILIES, SIZES
from tests.support.tiny_tokenizer import VOCAB_SIZE, write_tiny_tokenizer


def write_model(folder: Path, family: str, **config: Any) -> Path:
    """Random, biases and norms too."""
    torch.manual_seed(0)
    sizes = {**SIZES, **FAMILIES[family], "vocab_size": VOCAB_SIZE, **config}
    model: PreTrainedModel = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**sizes)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn(parameter.shape))
    model.save_pretrained(folder, max_shard_size=config.get("shards", "1GB"))
    return write_tiny_tokenizer(folder)


def settings_of(model: Path, cache: Path, **settings: Any) -> ModelSettings:
    return ModelSettings(**{"model": str(model), "cache": str(cache), "device_map": "cpu", **settings})
