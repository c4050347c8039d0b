"""From `--model` to a local folder in the layout of transformers."""

from __future__ import annotations

from pathlib import Path

from parleyd.config import EMBEDDED_MODEL, ModelSettings
from parleyd.errors import StartupError
from parleyd.model.conversion import converted
from parleyd.model.embedded import find_embedded_model


def find_folder(settings: ModelSettings) -> Path:
    """A folder as it is, a .gguf file converted, a Hub id downloaded; progress goes to stderr.

    Raises StartupError where there is no such model or it cannot be fetched.
    """
    name = settings.model
    if not name:  # as where a variable is set to nothing; it would be the folder that the service is started in
        raise StartupError("--model is empty: name a local folder, a .gguf file or a Hub id")
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise StartupError(f"--model {name}: a file, but not a .gguf file; give the folder that holds the model")
        return converted(path, settings.cache)
    if name == EMBEDDED_MODEL:
        return converted(find_embedded_model(), settings.cache)
    if _looks_like_a_path(name):
        raise StartupError(f"--model {name}: no such file or folder")
    from parleyd.model.hub import download  # costs time to import, and few starts need it

    return download(settings)


def _looks_like_a_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.endswith((".gguf", "/")) or name.count("/") > 1 or "\\" in name
