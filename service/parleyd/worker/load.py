"""From settings to a warm engine: the model loaded, the engine built on it, one short answer generated."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from parleyd.config import ModelSettings
from parleyd.engine.engine import Engine
from parleyd.errors import StartupError
from parleyd.generation import EngineRequest, ModelInfo, SamplingParams
from parleyd.model import lean_start
from parleyd.model.files import find_files
from parleyd.model.gguf_blocks import open_blocks
from parleyd.worker.build import build_engine
from parleyd.worker.obstacle import batching_obstacle

_logger = logging.getLogger("parleyd.worker")

_WARM_UP_PROMPT_TOKENS = 64


def load(settings: ModelSettings) -> tuple[Engine, ModelInfo]:
    """Raises StartupError if the model cannot be loaded, or does not generate."""
    started = time.monotonic()
    name, engine, info = _build(settings)
    info = replace(info, engine=name, max_running=engine.max_running)
    _warm_up(engine, info)
    _logger.info("model ready on %s after %.1f s", info.device, time.monotonic() - started)
    return engine, info


def _build(settings: ModelSettings) -> tuple[str, Engine, ModelInfo]:
    files = find_files(settings)
    place = lean_start.place_of(settings, files)
    if place is not None and (recalled := lean_start.recall(place, files)) is not None:
        model, info = recalled
        info = _limited(info, settings)
        return *build_engine(settings, model, info, open_blocks(files.folder, settings.cache)), info
    from parleyd.model.loader import load_model  # imports transformers' model code

    loaded = load_model(settings, files)
    if place is not None and batching_obstacle(loaded.model) is None:
        lean_start.remember(place, files, loaded.model, loaded.info)
    info = _limited(loaded.info, settings)
    return *build_engine(settings, loaded.model, info, loaded.blocks), info


def _limited(info: ModelInfo, settings: ModelSettings) -> ModelInfo:
    limit = settings.max_context_tokens
    if limit is None:
        return info
    if limit > info.max_context_tokens:
        raise StartupError(f"--max-context-tokens: the model's context holds {info.max_context_tokens}, not {limit}")
    return replace(info, max_context_tokens=limit)


def _warm_up(engine: Engine, info: ModelInfo) -> None:
    """Lets the first real request find every lazily made thing made."""
    num_prompt_tokens = min(_WARM_UP_PROMPT_TOKENS, info.max_context_tokens - 2)
    params = SamplingParams(max_new_tokens=2, min_new_tokens=2)
    engine.submit(EngineRequest(key=-1, prompt_ids=(0,) * num_prompt_tokens, params=params))
    outputs = engine.step()
    while not outputs[-1].is_last:
        outputs = engine.step()
    if error := outputs[-1].error:
        raise StartupError(f"engine {info.engine} cannot generate with this model: {error}")
