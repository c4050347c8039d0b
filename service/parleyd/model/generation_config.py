"""What a model's files say about generation: sampling defaults, the ids that end an answer, the context's length."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from parleyd.errors import StartupError
from parleyd.generation import RANGES, Range, SamplingDefaults
from parleyd.model.checkpoint import read_json_object

_logger = logging.getLogger("parleyd.model")

_FILE = "generation_config.json"
_KINDS: dict[str, type | tuple[type, ...]] = {
    "max_new_tokens": int, "min_new_tokens": int, "do_sample": bool, "temperature": (int, float), "top_p": (int, float),
    "top_k": int, "min_p": (int, float), "repetition_penalty": (int, float),
    "num_return_sequences": int,
}  # fmt: skip
_NO_LIMIT = 2**32 - 1  # of the requests' fields
_RANGES = RANGES | {
    "max_new_tokens": Range(1, _NO_LIMIT),
    "min_new_tokens": Range(0, _NO_LIMIT),
    "top_k": Range(0, _NO_LIMIT),
}

# Each architecture has its own name for it.
_CONTEXT_NAMES = (
    "max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "max_seq_length", "seq_length",
    "n_ctx",
)  # fmt: skip
_UNSAID_CONTEXT = 32_768  # for state-space models, whose context has no end; requests need one all the same
_TOKENIZER_UNLIMITED = 10**9  # transformers writes 10**30 for "no limit"


def read_defaults(folder: Path) -> SamplingDefaults:
    """Only what the file itself sets: transformers would fill the rest with defaults of its own.

    Raises StartupError where the file, or a value that we use, is not what it should be. One that is out of range does
    not count: of models that are greedy nobody ever looked at it, and elsewhere -1 may stand for "off".
    """
    values = _read(folder)
    given = {name: values.get(name) for name in _KINDS}
    for name, value in given.items():
        if value is not None and (
            not isinstance(value, _KINDS[name]) or isinstance(value, bool) != (name == "do_sample")
        ):
            raise _not_of_its_kind(folder, name, value)
        if value is not None and name in _RANGES and value not in _RANGES[name]:
            _logger.warning("%s: %s is %s, not %s: it is ignored", folder / _FILE, name, value, _RANGES[name])
            given[name] = None
    return SamplingDefaults(**given, stop_strings=_stop_strings(folder, values.get("stop_strings")))


def read_eos_token_ids(folder: Path, tokenizer_dir: Path, config: Any, vocab_size: int) -> tuple[int, ...]:
    """The ids that end an answer: generation_config.json's, else the model configuration's, else the tokenizer's.

    Empty where none is named of which there is a logit: answers then end by length or by the request's own stop ids.
    `config` is the loaded model's text configuration.
    """
    ids = _read(folder).get("eos_token_id")
    if ids is None:
        ids = getattr(config, "eos_token_id", None)
    if ids is None:
        ids = _tokenizer_eos_id(tokenizer_dir)
    if ids is None:
        return ()
    try:
        named = dict.fromkeys(int(token_id) for token_id in (ids if isinstance(ids, list | tuple) else [ids]))
    except (TypeError, ValueError, OverflowError) as error:
        raise _not_of_its_kind(folder, "eos_token_id", ids) from error
    return tuple(token_id for token_id in named if 0 <= token_id < vocab_size)


def max_context_tokens(config: Any, tokenizer_dir: Path) -> int:
    """Prompt and answer together. `config` is the loaded model's text configuration."""
    for name in _CONTEXT_NAMES:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return min(value, _NO_LIMIT)
    value = _read(tokenizer_dir, "tokenizer_config.json").get("model_max_length")
    if isinstance(value, int | float) and 0 < value < _TOKENIZER_UNLIMITED:
        return int(value)
    return _UNSAID_CONTEXT


def _stop_strings(folder: Path, value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value or []
    if not isinstance(strings, list) or not all(isinstance(one, str) and one for one in strings):
        raise _not_of_its_kind(folder, "stop_strings", value)
    return tuple(strings)


def _not_of_its_kind(folder: Path, name: str, value: object) -> StartupError:
    return StartupError(f"{folder / _FILE}: {name} is {value!r}, which is not a value of its kind")


def _read(folder: Path, name: str = _FILE) -> dict[str, Any]:
    path = folder / name
    return read_json_object(path) if path.is_file() else {}


def _tokenizer_eos_id(tokenizer_dir: Path) -> int | None:
    from transformers import PreTrainedTokenizerFast  # costs time, and few models need it

    token_id: int | None = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir).eos_token_id
    return token_id
