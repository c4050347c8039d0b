"""Loads a model through transformers, and describes it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import is_peft_available

from parleyd.config import ModelSettings
from parleyd.errors import StartupError
from parleyd.generation import ModelInfo
from parleyd.model import explain, generation_config
from parleyd.model.checkpoint import ADAPTER, Checkpoint
from parleyd.model.files import ModelFiles, find_files
from parleyd.model.gguf_blocks import GgufBlocks, open_blocks
from parleyd.model.memory import placement
from parleyd.model.quantization import quantization_config, unpack
from parleyd.model.quiet import silence_transformers

_logger = logging.getLogger("parleyd.model")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to generate, in evaluation mode, and what the gateway must know about it.

    `blocks`: what its weights were in the .gguf file that it was converted from.
    """

    model: PreTrainedModel
    info: ModelInfo
    blocks: GgufBlocks | None = None


def load_model(settings: ModelSettings, files: ModelFiles | None = None) -> LoadedModel:
    """Loads what `settings` name. `files`: where they have been found already.

    Raises StartupError, its message one line that names what is wrong and what to do.
    """
    silence_transformers()
    files = files or find_files(settings)
    folder, checkpoint, tokenizer_dir = files.folder, files.checkpoint, files.tokenizer_dir
    _check_generation_config(folder)
    if (folder / ADAPTER).exists() and not is_peft_available():  # transformers says nothing
        _logger.warning("%s holds an adapter, which is left out: the Python package peft is not installed", folder)
    model = _load_weights(checkpoint, settings, quantization_config(settings, checkpoint))
    config = model.config.get_text_config()
    embedding: Any = model.get_input_embeddings()
    num_logits = getattr(model.get_output_embeddings(), "out_features", None)
    vocab_size = min(embedding.weight.shape[0], num_logits or embedding.weight.shape[0])
    info = ModelInfo(
        tokenizer_dir=str(tokenizer_dir.resolve()),
        max_context_tokens=generation_config.max_context_tokens(config, tokenizer_dir),
        # Rows of the embedding, but for those without a logit, as of an image's token. They are often padded beyond the
        # tokenizer, and the model can draw those ids too, so clients that resume may send them. Where the tokenizer has
        # more ids, the model cannot take those.
        vocab_size=vocab_size,
        eos_token_ids=generation_config.read_eos_token_ids(folder, tokenizer_dir, config, vocab_size),
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        engine=settings.engine,
        max_running=1,  # the engine that is built on it knows better
        defaults=files.defaults,
    )
    return LoadedModel(model, info, open_blocks(folder, settings.cache))


def _check_generation_config(folder: Path) -> None:
    """transformers reads it once it has read the weights, and does not say what it found fault with."""
    path = folder / "generation_config.json"
    try:
        if path.is_file():
            GenerationConfig.from_pretrained(folder)
    except Exception as error:  # what a value of another kind raises is anything
        raise StartupError(f"{path}: {explain.one_line(error)}") from error


def _load_weights(checkpoint: Checkpoint, settings: ModelSettings, quantization: Any | None) -> PreTrainedModel:
    auto_model = _auto_model(checkpoint.config, settings.trust_remote_code)
    optional = {} if settings.attn_implementation == "auto" else {"attn_implementation": settings.attn_implementation}
    if quantization is not None:
        optional["quantization_config"] = quantization
    try:
        model, report = auto_model.from_pretrained(
            str(checkpoint.folder),
            dtype=settings.dtype,
            device_map=placement(settings.device_map, checkpoint.num_bytes(settings.dtype)),
            trust_remote_code=settings.trust_remote_code,
            use_safetensors=not checkpoint.is_pickled,
            output_loading_info=True,
            **optional,
        )
        if not report["missing_keys"]:
            unpack(model)
    except Exception as error:  # a broken or unusual model fails in many places, and each is for the operator to mend
        _logger.debug("loading %s failed", checkpoint.folder, exc_info=True)
        raise StartupError(f"--model {settings.model}: {_reason(error, settings)}") from error
    if missing := report["missing_keys"]:
        raise StartupError(f"--model {settings.model}: {explain.missing_weights(missing)}")
    assert isinstance(model, PreTrainedModel)
    return model


def _auto_model(config: Mapping[str, Any], trust_remote_code: bool) -> Any:
    """The class that loads it; no annotation of theirs knows output_loading_info."""
    if config.get("is_encoder_decoder"):  # AutoModelForCausalLM would take the decoder alone
        return AutoModelForSeq2SeqLM
    kind = config.get("model_type")
    # Those that see write text of text alone, too; code of their own may do so as a model that does not see.
    sees = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    has_own = trust_remote_code and AutoModelForCausalLM.__name__ in config.get("auto_map", ())
    return AutoModelForImageTextToText if sees and not has_own else AutoModelForCausalLM


def _reason(error: Exception, settings: ModelSettings) -> str:
    text = str(error)
    if explain.is_out_of_memory(error):
        return "too little memory to load it; choose a smaller model, or a smaller type with --dtype"
    if "trust_remote_code" in text:
        return "it comes with Python code of its own; if you trust its authors, run that with --trust-remote-code"
    if "Unrecognized configuration class" in text:
        return "not a model that generates text from text"
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return f"transformers {transformers.__version__} does not know this kind of model: {explain.one_line(error)}"
    if isinstance(error, ImportError):
        return f"it needs a Python package that is not installed: {explain.one_line(error)}"
    if isinstance(error, SafetensorError):
        return f"its weights cannot be read: {explain.one_line(error)}; copy or download them again"
    return f"it cannot be loaded: {explain.one_line(error)}"
