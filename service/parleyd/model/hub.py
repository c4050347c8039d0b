"""Download of a model from the Hugging Face Hub into huggingface_hub's own cache."""

from __future__ import annotations

import logging
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.utils._validators import validate_repo_id

from parleyd.config import ModelSettings
from parleyd.errors import StartupError
from parleyd.model import explain

_logger = logging.getLogger("parleyd.model")

_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
_CODE = ["*.py"]
# Most in subfolders is for other programs, and consolidated.safetensors repeats the weights in another layout.
_NOT_THESE = [*(f"*/{name}" for name in (*_FILES, *_CODE) if name != "*.jinja"), "consolidated*"]


def download(settings: ModelSettings) -> Path:
    """The local folder of a Hub id, downloaded unless it is there; progress bars on a terminal.

    Raises StartupError where the id is not valid or unknown, access is denied, or the Hub cannot be reached.
    """
    name = settings.model
    try:
        validate_repo_id(name)
        _logger.info("looking for %s in the Hub's cache, and downloading what is not there", name)
        folder = huggingface_hub.snapshot_download(
            name,
            revision=settings.revision,
            allow_patterns=_FILES + (_CODE if settings.trust_remote_code else []),
            ignore_patterns=_NOT_THESE,
        )
    except Exception as error:  # also what the HTTP library beneath raises
        raise StartupError(f"--model {name}: {_reason(error, settings)}") from error
    return Path(folder)


def _reason(error: Exception, settings: ModelSettings) -> str:
    revision = settings.revision
    match error:
        case errors.HFValidationError():
            return "no such file or folder, and not a valid Hub id (NAMESPACE/NAME)"
        case errors.GatedRepoError():
            return "a gated model: ask for access on its Hub page, then log in with `hf auth login`"
        case errors.RepositoryNotFoundError():
            return (
                "no such file or folder, and no such model on the Hub; for a private one, log in with `hf auth login`"
            )
        case errors.RevisionNotFoundError():
            return f"--revision {revision} does not exist on the Hub"
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled():
            return (
                "no such file or folder; as a Hub id, it is not downloaded yet and the Hub cannot be reached: "
                "check the network, or unset HF_HUB_OFFLINE"
            )
        case OSError(errno=int(), strerror=str(why)):
            return f"the download cannot be written: {why}"
    return f"the download failed: {explain.one_line(error)}"
