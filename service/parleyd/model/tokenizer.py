"""A folder from which the gateway, which has no torch, can read the tokenizer: one with a tokenizer.json."""

from __future__ import annotations

import logging
import shutil
from importlib.util import find_spec
from pathlib import Path

from parleyd.config import ModelSettings
from parleyd.errors import StartupError
from parleyd.model import explain
from parleyd.model.cache import cache_key, cache_root, cached_folder

_logger = logging.getLogger("parleyd.model")

# Part of the cache's key: raise it with every change to what a conversion writes.
_VERSION = "2"

_VOCABULARIES = ("*.model", "*.tiktoken", "tekken.json", "vocab*", "merges.txt")
_PROCESSOR_TEMPLATE = "chat_template.json"  # a processor's, which a tokenizer does not save
_DETAILS = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", _PROCESSOR_TEMPLATE, "*.jinja",
    "additional_chat_templates/*",
)  # fmt: skip


def find_tokenizer(folder: Path, settings: ModelSettings) -> Path:
    """The model's own folder where it has a tokenizer.json, else a folder in the cache with one made from it.

    Raises StartupError where the folder has no tokenizer or one that cannot be converted.
    """
    if (folder / "tokenizer.json").is_file():
        return folder
    if not _found(folder, _VOCABULARIES):
        raise StartupError(f"--model {folder}: it has no tokenizer: neither tokenizer.json nor a vocabulary file")
    key = cache_key(_VERSION, *_found(folder, _VOCABULARIES + _DETAILS))
    name = f"{folder.resolve().name}-tokenizer-{key}"
    return cached_folder(cache_root(settings.cache), name, lambda target: _convert(folder, target, settings))


def _found(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _convert(folder: Path, target: Path, settings: ModelSettings) -> None:
    from transformers import AutoTokenizer

    from parleyd.model.quiet import silence_transformers

    silence_transformers()
    _logger.info("converting the tokenizer of %s; this happens once", folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=settings.trust_remote_code, local_files_only=True
        )
    except Exception as error:
        why = explain.one_line(error)
        if isinstance(error, ValueError) and "tiktoken" in why and find_spec("sentencepiece") is None:
            # transformers tries the one after the other, and names the last
            why = "it needs the Python package sentencepiece (tiktoken where that wrote it), which is not installed"
        raise StartupError(f"--model {folder}: its tokenizer cannot be read: {why}") from error
    tokenizer.save_pretrained(target)
    if (folder / _PROCESSOR_TEMPLATE).is_file():
        shutil.copy(folder / _PROCESSOR_TEMPLATE, target)
    if not (target / "tokenizer.json").is_file():
        raise StartupError(
            f"--model {folder}: its tokenizer, {type(tokenizer).__name__}, cannot be converted to a tokenizer.json"
        )
