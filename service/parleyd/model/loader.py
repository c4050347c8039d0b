"""Loads the model that the settings name: find it, check it, load it, describe it. worker/load.py calls this."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from parleyd.config import ModelSettings
from parleyd.generation import ModelInfo
from parleyd.model.source import find_folder


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to generate, in evaluation mode, and what the gateway must know about it."""

    model: PreTrainedModel
    info: ModelInfo


def load_model(settings: ModelSettings) -> LoadedModel:
    folder = find_folder(settings)
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=settings.dtype, device_map=settings.device_map)
    info = ModelInfo(tokenizer_dir=str(folder), max_context_tokens=model.config.max_position_embeddings,
        vocab_size=model.config.vocab_size, eos_token_ids=(model.generation_config.eos_token_id,), dtype=str(model.dtype),
        device=str(model.device), engine=settings.engine, max_running=settings.max_running)
    return LoadedModel(model, info)
