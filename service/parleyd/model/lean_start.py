"""Starts without transformers: what it has made of a checkpoint is remembered, and weights are read as they lie.

Importing its model code, and what that imports in turn, takes longer than all else at the start of a small model.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from parleyd.config import ModelSettings
from parleyd.generation import ModelInfo
from parleyd.model.cache import cache_key, cache_root
from parleyd.model.checkpoint import ADAPTER
from parleyd.model.files import ModelFiles
from parleyd.model.lean_model import LeanModel, LeanShape, can_be_lean, lean_shape, lean_weights
from parleyd.model.memory import is_on_cpu

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_logger = logging.getLogger("parleyd.model")

# Part of the key: raise it with every change to what is remembered.
_VERSION = 2
_SMALL = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class _Memory:
    """A model but for its weights, and their names."""

    info: ModelInfo
    shape: LeanShape
    names: tuple[str, ...]


def place_of(settings: ModelSettings, files: ModelFiles) -> Path | None:
    """The file in which the model is remembered, a new one whenever something about it changes; None where something
    is asked for that only transformers does."""
    is_plain = (
        settings.engine == "batching"
        and settings.lean_layers
        and settings.attn_implementation == settings.quantization == "auto"
        and not settings.trust_remote_code
        and not files.checkpoint.is_pickled
        and not (files.folder / ADAPTER).exists()
        and is_on_cpu(settings.device_map)
    )
    if not is_plain:
        return None
    described_by = [path for path in sorted(files.folder.glob("*.json")) if path.is_file()]
    # Some tools set all files' times to the same.
    contents = zlib.crc32(b"".join(path.read_bytes() for path in described_by if path.name in _SMALL))
    version = (_VERSION, importlib.metadata.version("transformers"), settings.dtype, contents)
    key = cache_key(repr(version), *described_by, *files.checkpoint.weight_files)
    return cache_root(settings.cache) / f"{files.folder.resolve().name}-{key}.lean.json"


def recall(place: Path, files: ModelFiles) -> tuple[LeanModel, ModelInfo] | None:
    """The model as transformers would load it, if it has done so before; None where it has to do it now, be it to tell
    what is wrong."""
    try:
        memory = msgspec.json.decode(place.read_bytes(), type=_Memory)
        weights = dict(_read_weights(files, memory.names, getattr(torch, memory.info.dtype)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, MemoryError, RuntimeError, SafetensorError):
        _logger.debug("%s is of no use", place, exc_info=True)
        return None
    info = replace(memory.info, tokenizer_dir=str(files.tokenizer_dir.resolve()), defaults=files.defaults)
    return LeanModel(memory.shape, weights), info


def remember(place: Path, files: ModelFiles, model: PreTrainedModel, info: ModelInfo) -> None:
    """Lets the next start recall a model that transformers has just loaded, if it can be."""
    if not can_be_lean(model):
        return
    weights = lean_weights(model)
    if not _are_as_in_files(weights, files):
        return
    temporary = place.with_suffix(f".{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(msgspec.json.encode(_Memory(info, lean_shape(model), tuple(weights))))
        temporary.replace(place)
    except OSError as error:  # it starts all the same
        _logger.debug("the model is not remembered: %s", error)
        with suppress(OSError):
            temporary.unlink()


def _are_as_in_files(weights: dict[str, Tensor], files: ModelFiles) -> bool:
    """One by one, lest all be held twice."""
    dtype = next(iter(weights.values())).dtype
    try:
        read = _read_weights(files, weights, dtype)
        return all(weights[name].dtype == dtype and torch.equal(weights[name], weight) for name, weight in read)
    except KeyError:
        return False


def _read_weights(files: ModelFiles, names: Iterable[str], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Raises KeyError where the files do not have them all."""
    place: dict[str, Any] = {}
    with ExitStack() as stack:
        for path in files.checkpoint.weight_files:
            file: Any = stack.enter_context(safe_open(path, framework="pt"))
            place |= dict.fromkeys(file.keys(), file)
        for name in names:
            # A copy: what is only mapped would be read again whenever its pages were dropped.
            yield name, place[name].get_tensor(name).to(dtype, copy=True)
