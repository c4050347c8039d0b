"""A .gguf file to a model folder that loads fast: safetensors, configuration, tokenizer and chat template, made once."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parleyd.errors import StartupError
from parleyd.model import explain
from parleyd.model.cache import cache_key, cache_root, cached_folder

if TYPE_CHECKING:
    import torch

_logger = logging.getLogger("parleyd.model")

# Part of the cache's key: raise it with every change to what a conversion writes.
_VERSION = 1


def converted(gguf_file: Path, cache: str | None) -> Path:
    """The folder that holds `gguf_file` converted; converts it the first time, with progress bars on stderr.

    Raises StartupError where the file is no GGUF file, holds no model that transformers knows, or where the cache
    folder cannot be written.
    """
    _check_magic(gguf_file)
    root = cache_root(cache)
    name = f"{gguf_file.stem}-{cache_key(_VERSION, gguf_file)}"
    return cached_folder(root, name, lambda folder: _convert(gguf_file, folder))


def _check_magic(gguf_file: Path) -> None:
    try:
        with gguf_file.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise StartupError(f"--model {gguf_file}: cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise StartupError(f"--model {gguf_file}: not a GGUF file (it begins with {magic!r}, not b'GGUF')")


def _convert(gguf_file: Path, folder: Path) -> None:
    _logger.info("converting %s; this happens once", gguf_file)
    started = time.monotonic()
    try:
        with _parsed_once():
            model, tokenizer = _read(gguf_file)
    except StartupError:
        raise
    except Exception as error:  # a broken file fails in many places of gguf, numpy, tokenizers and transformers
        _logger.debug("reading %s failed", gguf_file, exc_info=True)
        raise StartupError(
            f"--model {gguf_file}: this GGUF file is broken or of a kind that cannot be read: {explain.one_line(error)}"
        ) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _logger.info("converted in %.1f s", time.monotonic() - started)


def _read(gguf_file: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model, report = AutoModelForCausalLM.from_pretrained(
        str(gguf_file.parent),
        gguf_file=gguf_file.name,
        dtype=_dtype(gguf_file),
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    if missing := report["missing_keys"]:
        raise StartupError(f"--model {gguf_file}: {explain.missing_weights(missing)}")
    return model, AutoTokenizer.from_pretrained(str(gguf_file.parent), gguf_file=gguf_file.name)


def _dtype(gguf_file: Path) -> torch.dtype:
    """The file's own type where its matrices are plain floats, else bfloat16.

    Quantised values have at most 8 significant bits, times a scale: rounding them to bfloat16 adds an error far below that
    of the quantisation, and halves file, memory and the time of a decode step against float32.
    """
    import gguf
    import torch

    kinds = {tensor.tensor_type for tensor in gguf.GGUFReader(str(gguf_file)).tensors if len(tensor.shape) > 1}
    if kinds == {gguf.GGMLQuantizationType.F32}:
        return torch.float32
    return torch.float16 if kinds == {gguf.GGMLQuantizationType.F16} else torch.bfloat16


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """Lets transformers parse the file once and not thrice, and build gguf's table of names once and not once a module.

    Takes a conversion from 35 s to 10 s. Should transformers stop calling these two, it is merely slow again.
    """
    import gguf

    patched = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in patched.items():
        setattr(gguf, name, functools.cache(function))
    try:
        yield
    finally:
        for name, function in patched.items():
            setattr(gguf, name, function)
