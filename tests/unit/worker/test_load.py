"""From settings to a warm engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from parleyd.config import ModelSettings
from parleyd.errors import StartupError
from parleyd.worker.load import load
from tests.support.tiny_models import CONTEXT, request, run
from tests.unit.model.test_lean_start import settings_of, write_model

# What a KV cache of 100 tokens takes, in GiB.
_KV_CACHE = 100 * 2 * 2 * 2 * 8 * 4 / 2**30


@pytest.mark.parametrize("engine", ["batching", "generate"])
def test_a_context_can_be_shorter_than_the_models_own(tmp_path: Path, engine: str) -> None:
    folder = write_model(tmp_path / "model", "Llama")
    settings = settings_of(folder, tmp_path / "cache", engine=engine, max_context_tokens=32, kv_cache_memory=_KV_CACHE)
    for _ in range(2):  # the second start may be another way
        built, info = load(settings)
        assert (info.engine, info.max_context_tokens) == (engine, 32)
        ids = run(built, request(1, (5,) * 20, max_new_tokens=50, ignore_eos=True))[1]
        assert len(ids) == 12


def test_a_kv_cache_that_is_too_small_is_refused_with_what_asks_for_less(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "Llama")
    with pytest.raises(StartupError, match="--max-context-tokens asks for less"):
        load(settings_of(folder, tmp_path / "cache", kv_cache_memory=_KV_CACHE))


def test_no_context_is_longer_than_the_models_own(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "Llama")
    with pytest.raises(StartupError, match=f"--max-context-tokens: the model's context holds {CONTEXT}, not 1000"):
        load(settings_of(folder, tmp_path / "cache", max_context_tokens=1000))


def test_without_a_limit_the_context_is_the_models_own(tmp_path: Path) -> None:
    settings: ModelSettings = settings_of(write_model(tmp_path / "model", "Llama"), tmp_path / "cache")
    assert load(settings)[1].max_context_tokens == CONTEXT
