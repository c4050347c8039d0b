"""Everything about a model that can be known, and be wrong, before its weights are read: found and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from parleyd.config import ModelSettings
from parleyd.errors import StartupError
from parleyd.generation import SamplingDefaults
from parleyd.model import generation_config
from parleyd.model.checkpoint import Checkpoint
from parleyd.model.memory import check_device_map, check_fits
from parleyd.model.source import find_folder
from parleyd.model.tokenizer import find_tokenizer


@dataclass(frozen=True)
class ModelFiles:
    """A model's folder, what is in it, and the folder that the gateway reads the tokenizer from."""

    folder: Path
    checkpoint: Checkpoint
    defaults: SamplingDefaults
    tokenizer_dir: Path


def find_files(settings: ModelSettings) -> ModelFiles:
    """Those of what `settings` name, downloaded or converted first where needed; progress bars go to a terminal.

    Raises StartupError, its message one line that names what is wrong and what to do.
    """
    check_device_map(settings.device_map)
    _check_attention(settings)
    try:
        folder = find_folder(settings)
        checkpoint = Checkpoint.open(folder, settings.allow_pickle)
    except PermissionError as error:  # of a folder on the way; a file of ours that cannot be read is told where it is
        raise StartupError(f"--model {settings.model}: {error.filename}: {error.strerror}") from error
    defaults = generation_config.read_defaults(folder)
    tokenizer_dir = find_tokenizer(folder, settings)
    check_fits(settings.model, checkpoint.num_bytes(settings.dtype), settings.device_map)
    return ModelFiles(folder, checkpoint, defaults, tokenizer_dir)


def _check_attention(settings: ModelSettings) -> None:
    if settings.attn_implementation != "flash_attention_2":
        return
    from transformers.utils.import_utils import is_flash_attn_2_available  # costs time, and few starts need it

    # transformers would fetch a kernel from the Hub in its place, or fail only after the weights are read.
    if not is_flash_attn_2_available():
        raise StartupError(
            "--attn-implementation flash_attention_2: FlashAttention 2 is not installed, or there is no GPU for it; "
            "install the package flash-attn, or use sdpa"
        )
