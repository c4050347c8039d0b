"""Fixtures of the end-to-end tests: `parleyd serve` with the real embedded model, and that model in this process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.served import ServedProcess


@pytest.fixture(scope="session", params=["batching", "generate"])
def served(request: pytest.FixtureRequest) -> Iterator[ServedProcess]:
    """One server of each engine, in float32 so that its ids can be held against the model's own."""
    with ServedProcess("--engine", request.param, "--dtype", "float32", "--drain-delay", "0") as process:
        process.wait_health()
        yield process
        assert process.terminate() == 0


@pytest.fixture(scope="session")
def oracle() -> Any:
    """The embedded model and its tokenizer, as transformers loads them from the converted folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from parleyd.config import ModelSettings
    from parleyd.model.loader import load_model

    folder = load_model(ModelSettings(dtype="float32")).info.tokenizer_dir
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    return model, AutoTokenizer.from_pretrained(folder)
