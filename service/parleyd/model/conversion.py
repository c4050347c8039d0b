"""A .gguf file to a model folder that loads fast: safetensors, configuration, tokenizer, chat template; made once."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib.metadata
import logging
import shutil
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
_VERSION = 2

_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def converted(gguf_file: Path, cache: str | None) -> Path:
    """The folder that holds `gguf_file` converted; converts it the first time, with progress bars on a terminal.

    Raises StartupError where the file is no GGUF file, holds no model that transformers knows, or where the cache
    folder cannot be written.
    """
    _check_magic(gguf_file)
    root = cache_root(cache)
    # transformers does most of the work, and a newer one may do it better.
    key = cache_key(f"{_VERSION} {importlib.metadata.version('transformers')}", gguf_file)
    name = f"{gguf_file.stem}-{key}"

    def build(folder: Path) -> None:
        _convert(gguf_file, folder)
        _return_memory()

    return cached_folder(root, name, build)


def _check_magic(gguf_file: Path) -> None:
    try:
        with gguf_file.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise StartupError(f"--model {gguf_file}: cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise StartupError(f"--model {gguf_file}: not a GGUF file (it begins with {magic!r}, not b'GGUF')")


def _convert(gguf_file: Path, folder: Path) -> None:
    from parleyd.model.gguf_blocks import read_blocks, save_blocks

    _logger.info("converting %s; this happens once", gguf_file)
    started = time.monotonic()
    try:
        with _parsed_once():
            model, tokenizer = _read(gguf_file)
            blocks = read_blocks(gguf_file, model)
    except StartupError:
        raise
    except Exception as error:  # a broken file fails in many places of gguf, numpy, tokenizers and transformers
        _logger.debug("reading %s failed", gguf_file, exc_info=True)
        raise StartupError(
            f"--model {gguf_file}: this GGUF file is broken or of a kind that cannot be read: {explain.one_line(error)}"
        ) from error
    model.save_pretrained(folder)
    save_blocks(blocks, folder)
    tokenizer.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", path)  # safetensors makes files that only their owner can read
    _logger.info("converted in %.1f s", time.monotonic() - started)


def _return_memory() -> None:
    """Twice the weights would else stay taken for as long as the worker lives: while it loads it collects no garbage,
    and what is freed between other things the allocator keeps."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)


def _read(gguf_file: Path) -> tuple[Any, Any]:
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from parleyd.model.gguf_blocks import num_block_bytes
    from parleyd.model.memory import check_fits
    from parleyd.model.quiet import silence_transformers

    silence_transformers()
    reader = gguf.GGUFReader(str(gguf_file))
    parts = reader.fields.get("split.count")
    if parts and (num_parts := parts.contents()) > 1:
        raise StartupError(
            f"--model {gguf_file}: one of {num_parts} parts of a file; join them with llama.cpp's llama-gguf-split "
            "--merge, and serve what that writes"
        )
    dtype = _dtype(gguf_file)
    auto_model: Any = AutoModelForCausalLM  # its annotations know no output_loading_info
    num_elements = sum(int(tensor.n_elements) for tensor in reader.tensors)
    check_fits(str(gguf_file), num_elements * dtype.itemsize + num_block_bytes(reader), "cpu")
    model, report = auto_model.from_pretrained(
        str(gguf_file.parent),
        gguf_file=gguf_file.name,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    if missing := report["missing_keys"]:
        raise StartupError(f"--model {gguf_file}: {explain.missing_weights(missing)}")
    tokenizer = AutoTokenizer.from_pretrained(str(gguf_file.parent), gguf_file=gguf_file.name)
    _mend_tokenizer(tokenizer, gguf_file)
    return model, tokenizer


def _mend_tokenizer(tokenizer: Any, gguf_file: Path) -> None:
    """Takes from the file what transformers 5.17 gets wrong: which tokens are special, and how bytes become text."""
    import gguf
    from tokenizers import decoders

    fields = gguf.GGUFReader(str(gguf_file)).fields
    for name, key in _SPECIAL_TOKENS.items():
        if field := fields.get(f"tokenizer.ggml.{key}"):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(field.contents())))
    kind = fields.get("tokenizer.ggml.model")
    if kind and kind.contents() == "gpt2":
        tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()


def _dtype(gguf_file: Path) -> torch.dtype:
    """The file's own type where its matrices are plain floats, else bfloat16.

    What models were trained in before they were quantised is bfloat16 as a rule, and its rounding is far finer than the
    quantisation's own; against float32 it halves file, memory and the time of a decode step.
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
