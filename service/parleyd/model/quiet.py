"""Keeps transformers from telling operators what only its own users can act on."""

from __future__ import annotations

import logging
import warnings

import transformers


def silence_transformers() -> None:
    """Warnings off, errors and progress bars on. A verbosity set through TRANSFORMERS_VERBOSITY stays."""
    if transformers.logging.get_verbosity() == logging.WARNING:
        transformers.logging.set_verbosity(logging.ERROR)
    for module in ("transformers", "accelerate", "huggingface_hub"):
        warnings.filterwarnings("ignore", module=rf"{module}\b")
