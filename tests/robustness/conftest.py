"""Seed and length of the robustness runs: ROBUSTNESS_SEED repeats one, ROBUSTNESS_SECONDS makes it longer."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.robustness.validators import Belongings
from tests.support.gateway import GatewayThread, scripted_command, scripted_settings
from tests.support.requests import ask
from tests.support.tiny_tokenizer import write_tiny_tokenizer

SECONDS = float(os.environ.get("ROBUSTNESS_SECONDS", "6"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What dies and starts again must have done so in the time that clients give it."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.alone)


@pytest.fixture
def chance() -> random.Random:
    """All that is left to chance; a failing test shows the seed."""
    seed = int(os.environ.get("ROBUSTNESS_SEED", "20250101"))
    print(f"ROBUSTNESS_SEED={seed}")
    return random.Random(seed)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tokenizer(tmp_path_factory.mktemp("robustness"))


@pytest.fixture
def before(tokenizer_folder: Path) -> Belongings:
    """What this process holds once gRPC has been used, which keeps some of what it opens."""
    with GatewayThread(scripted_settings(), scripted_command(tokenizer_folder)) as gateway:
        gateway.stub.Generate(ask("hello"), timeout=10)
    return Belongings()


@pytest.fixture
def seconds() -> float:
    """How long traffic is to last."""
    return SECONDS
