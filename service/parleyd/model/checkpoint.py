"""What a model folder holds, seen without loading it: configuration and weight headers. Standard library only."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from parleyd.errors import StartupError

ADAPTER = "adapter_config.json"
_INDEX = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit

# safetensors' names of the types that a cast applies to; quantised weights and tables of integers keep theirs.
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
_CAUSAL_HEADS = ("CausalLM", "ConditionalGeneration", "LMHead")


@dataclass(frozen=True)
class _Tensor:
    dtype: str
    num_bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A folder that has passed the checks of `open`. `config` is config.json as it stands.

    `weight_files` hold `tensors`. Of pickled weights, which are not looked into, each file counts as one tensor.
    """

    folder: Path
    config: dict[str, Any]
    weight_files: tuple[Path, ...]
    tensors: tuple[_Tensor, ...]
    is_pickled: bool = False

    @classmethod
    def open(cls, folder: Path, allow_pickle: bool = False) -> Checkpoint:
        """Raises StartupError where the folder holds no language model in safetensors files that are whole, or,
        where that is allowed, in pickled ones."""
        if not (folder / "config.json").is_file():
            why = _what_else_it_is(folder) or "not a model folder: it has no config.json"
            raise StartupError(f"--model {folder}: {why}")
        config = read_json_object(folder / "config.json")
        _check_architecture(folder, config)
        has_safetensors = any((folder / name).is_file() for name in (_SINGLE_FILE, _INDEX))
        if allow_pickle and not has_safetensors and (pickles := tuple(sorted(folder.glob("pytorch_model*.bin")))):
            sizes = tuple(_Tensor("pickle", path.stat().st_size) for path in pickles)
            return cls(folder, config, pickles, sizes, is_pickled=True)
        files = tuple(_weight_files(folder))
        return cls(folder, config, files, tuple(tensor for path in files for tensor in _read_header(path)))

    def num_bytes(self, dtype: str) -> int:
        """The size of the weights once loaded as `dtype`, where "auto" is the type that config.json names."""
        if dtype == "auto":
            dtype = str(self.config.get("dtype") or self.config.get("torch_dtype"))
        item_bytes = None if "quantization_config" in self.config else _ITEM_BYTES.get(dtype)
        return sum(
            tensor.num_bytes // _FLOATS[tensor.dtype] * item_bytes
            if item_bytes and tensor.dtype in _FLOATS
            else tensor.num_bytes
            for tensor in self.tensors
        )


def read_json_object(path: Path) -> dict[str, Any]:
    """Raises StartupError where the file cannot be read as a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StartupError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(value, dict):
        raise StartupError(f"{path} holds no JSON object")
    return value


def _what_else_it_is(folder: Path) -> str:
    """Of a folder that is no model, and what to do; empty where nothing is known of it."""
    if (folder / ADAPTER).is_file():
        base = read_json_object(folder / ADAPTER).get("base_model_name_or_path") or "its base model"
        return (
            f"an adapter, such as LoRA, not a model; merge it into {base} with the package peft (merge_and_unload), "
            "and serve what that saves"
        )
    if ggufs := sorted(folder.glob("*.gguf")):
        return f"not a model folder; to serve the GGUF file in it, use --model {ggufs[0]}"
    return ""


def _check_architecture(folder: Path, config: dict[str, Any]) -> None:
    # transformers would load the body of, say, a classifier and make up the head that is missing.
    architectures = config.get("architectures")
    names = [str(name) for name in architectures] if isinstance(architectures, list) else []
    if names and all("For" in name and not any(head in name for head in _CAUSAL_HEADS) for name in names):
        raise StartupError(f"--model {folder}: not a language model but {', '.join(names)}")


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _SINGLE_FILE).is_file():
        return [folder / _SINGLE_FILE]
    if (folder / _INDEX).is_file():
        weight_map = read_json_object(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise StartupError(f"{folder / _INDEX} has no weight_map")
        paths = [folder / name for name in sorted(set(map(str, weight_map.values())))]
        try:
            missing = [path.name for path in paths if not path.is_file()]
        except OSError as error:
            raise StartupError(f"{folder / _INDEX} names a file that none can be: {error.strerror}") from error
        if missing:
            names = shorten(", ".join(missing), 200)
            raise StartupError(f"--model {folder}: weight files are missing: {names}")
        return paths
    raise StartupError(f"--model {folder}: {_why_no_weights(folder)}")


def _why_no_weights(folder: Path) -> str:
    if why := _what_else_it_is(folder):
        return why
    if any(path for pattern in _PICKLES for path in folder.glob(pattern)):
        return (
            "only pickled weights (.bin, .pt), a format that can carry code; convert them to safetensors, or take them "
            "with --allow-pickle (pytorch_model*.bin)"
        )
    return f"no weights: it has neither {_SINGLE_FILE} nor {_INDEX}"


def _read_header(path: Path) -> Iterator[_Tensor]:
    """The tensors that a safetensors file declares. Raises StartupError where the file is not whole."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            (header_bytes,) = struct.unpack("<Q", stream.read(8))
            if header_bytes > min(size, _MAX_HEADER_BYTES):
                raise ValueError("the header is cut off")
            header: dict[str, Any] = json.loads(stream.read(header_bytes))
        header.pop("__metadata__", None)
        end = 8 + header_bytes
        for entry in header.values():
            start, stop = entry["data_offsets"]
            end = max(end, 8 + header_bytes + stop)
            yield _Tensor(str(entry["dtype"]), stop - start)
    except OSError as error:
        raise StartupError(f"{path} cannot be read: {error.strerror}") from error
    except (struct.error, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StartupError(f"{path} is not a safetensors file, or broken: {error}") from error
    if end != size:
        raise StartupError(f"{path} is not whole: it has {size} bytes of {end}; copy or download it again")
