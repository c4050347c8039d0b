"""Starts without transformers: what it has made of a checkpoint is remembered, and weights are read as they lie.

Importing its model code, and what that imports in turn, takes longer than all else at the start of a small model.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from safetensors import safe_open
from torch import Tensor

from parleyd.config import ModelSettings
from parleyd.errors import StartupError
from parleyd.generation import ModelInfo
from parleyd.model.cache import cache_key, cache_root, cached_folder
from parleyd.model.files import ModelFiles
from parleyd.model.lean_model import LeanModel, LeanShape, can_be_lean, lean_shape, lean_weights
from parleyd.model.memory import is_on_cpu

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_logger = logging.getLogger("parleyd.model")

# Part of the cache's key: raise it with every change to what is remembered.
_VERSION = 1
_FILE = "model.json"


@dataclass(frozen=True)
class _Memory:
    """A model but for its weights, and their names."""

    info: ModelInfo
    shape: LeanShape
    names: tuple[str, ...]


def recall(settings: ModelSettings, files: ModelFiles) -> tuple[LeanModel, ModelInfo] | None:
    """The model as transformers would load it, if it has done so before; None where it has to do it now."""
    if not _is_plain(settings, files):
        return None
    path = _folder(settings, files) / _FILE
    try:
        memory = msgspec.json.decode(path.read_bytes(), type=_Memory)
    except (OSError, msgspec.DecodeError):
        return None
    info = replace(memory.info, tokenizer_dir=str(files.tokenizer_dir.resolve()))
    return LeanModel(memory.shape, _read_weights(files, memory.names, getattr(torch, info.dtype))), info


def remember(settings: ModelSettings, files: ModelFiles, model: PreTrainedModel, info: ModelInfo) -> None:
    """Lets the next start recall a model that transformers has just loaded, if it can be."""
    if not (_is_plain(settings, files) and model.device.type == "cpu" and can_be_lean(model)):
        return
    weights = lean_weights(model)
    if not _are_as_in_files(weights, files):
        return
    memory = _Memory(info, lean_shape(model), tuple(weights))
    folder = _folder(settings, files)
    try:
        cached_folder(folder.parent, folder.name, lambda into: _write(into / _FILE, memory))
    except StartupError as error:  # it starts all the same
        _logger.debug("the model is not remembered: %s", error)


def _is_plain(settings: ModelSettings, files: ModelFiles) -> bool:
    """Whether nothing is asked for that only transformers does."""
    return (
        settings.engine == "batching"
        and settings.lean_layers
        and settings.attn_implementation == settings.quantization == "auto"
        and not settings.trust_remote_code
        and not files.checkpoint.is_pickled
        and is_on_cpu(settings.device_map)
    )


def _folder(settings: ModelSettings, files: ModelFiles) -> Path:
    version = f"{_VERSION} {importlib.metadata.version('transformers')} {settings.dtype}"
    described_by = sorted(files.folder.glob("*.json"))
    key = cache_key(version, *described_by, *files.checkpoint.weight_files)
    return cache_root(settings.cache) / f"{files.folder.resolve().name}-lean-{key}"


def _write(path: Path, memory: _Memory) -> None:
    path.write_bytes(msgspec.json.encode(memory))


def _are_as_in_files(weights: dict[str, Tensor], files: ModelFiles) -> bool:
    try:
        read = _read_weights(files, weights, next(iter(weights.values())).dtype)
    except KeyError:
        return False
    return all(torch.equal(read[name], weight) for name, weight in weights.items())


def _read_weights(files: ModelFiles, names: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Raises KeyError where the files do not have them all."""
    place: dict[str, Any] = {}
    with ExitStack() as stack:
        for path in files.checkpoint.weight_files:
            file: Any = stack.enter_context(safe_open(path, framework="pt"))
            place |= dict.fromkeys(file.keys(), file)
        # Copies: what is only mapped would be read again whenever its pages were dropped.
        return {name: place[name].get_tensor(name).to(dtype, copy=True) for name in names}
