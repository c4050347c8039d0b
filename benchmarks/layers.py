"""What a decode step of the embedded model costs in the engine's layers, variant against variant in one process.

`python -m benchmarks.layers`: forward passes over a paged cache, no scheduler, no sampling. The variants take turns, so
that a busy machine hurts all alike. A variant's figure is the median of its turns, a gain that of the ratios by turn;
each is told in time by the clock and in processor time, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in the worker; must be there before torch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.environment import describe
from parleyd.config import ModelSettings
from parleyd.cpu_kernels import layers as compiled_layers
from parleyd.cpu_kernels.decode import paged_decode
from parleyd.engine.attention import PagedKVCache, StepLayout
from parleyd.engine.layer_ops import TorchOps
from parleyd.engine.lean_forward import LeanForward
from parleyd.engine.model_runner import Forward, StockForward
from parleyd.engine.paged_attention import Kernels
from parleyd.engine.request import Batch, Sequence
from parleyd.generation import EngineRequest, SamplingParams
from parleyd.model.linear.by_rows import ByRows
from parleyd.model.loader import LoadedModel, load_model

RESULTS = Path(__file__).parent / "results" / "layers.json"
BATCHES = (1, 4, 16, 64)
CONTEXT, BLOCK_SIZE = 160, 32
# Each row: a variant, and the one that its gain is told against.
GAINS = (
    ("lean", "stock"),
    ("packed", "lean"),
    ("four_bit", "packed"),
    ("chosen", "packed"),
    ("layer_norm", "chosen"),
    ("compiled", "chosen"),
    ("compiled_packed", "packed"),
)


class Seconds(NamedTuple):
    """Of a step."""

    wall: float
    processor: float


class LayerNorm(TorchOps):
    """RMS norm of x as the layer norm of [x, -x], whose mean is 0: one fused kernel on a CPU."""

    def add_and_normalise(self, x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
        if delta is not None:
            x += delta
        doubled = F.layer_norm(torch.cat([x, -x], -1), (2 * len(weight),), torch.cat([weight, weight]), None, epsilon)
        return doubled[..., : len(weight)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--json", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    loaded = [load_model(ModelSettings()) for _ in range(3)]
    cache = build_cache(loaded[0])
    forwards = build_variants(loaded, cache)
    report: dict[str, Any] = {"environment": describe(), "context": CONTEXT, "turns": arguments.turns, "batches": {}}
    print(json.dumps(report["environment"], indent=2))
    for batch in arguments.batches:
        times = measure(forwards, cache, batch, arguments.turns)
        report["batches"][batch] = summary = {clock: summarise(times, clock) for clock in ("wall", "processor")}
        for clock, figures in summary.items():
            print(f"batch {batch}, ms of {clock} time a step: " + text(figures["ms"], ".1f"))
            print("  gains: " + text(figures["gains"], ".2f"), flush=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")  # each time, lest a run that is cut off be lost


def summarise(times: dict[str, list[Seconds]], clock: str) -> dict[str, dict[str, float]]:
    taken = {name: [getattr(seconds, clock) for seconds in turns] for name, turns in times.items()}
    return {
        "ms": {name: 1000 * statistics.median(turns) for name, turns in taken.items()},
        "gains": {
            f"{name} / {other}": statistics.median(b / a for a, b in zip(taken[name], taken[other], strict=True))
            for name, other in GAINS
        },
    }


def text(figures: dict[str, float], form: str) -> str:
    return ", ".join(f"{name} {figure:{form}}" for name, figure in figures.items())


def build_cache(loaded: LoadedModel) -> PagedKVCache:
    config: Any = loaded.model.config
    num_blocks = BATCHES[-1] * CONTEXT // BLOCK_SIZE
    shape = (config.num_hidden_layers, num_blocks, BLOCK_SIZE, config.num_key_value_heads, config.head_dim)
    return PagedKVCache(shape, torch.bfloat16, "cpu")


def build_variants(loaded: list[LoadedModel], cache: PagedKVCache) -> dict[str, Forward]:
    """By name. What shares weights differs in code alone."""
    chosen = LeanForward(loaded[2].model, cache, blocks=loaded[2].blocks)
    compiled, layer_norm = copy.copy(chosen), copy.copy(chosen)
    compiled._ops, compiled._cache = compiled_layers, with_kernels(cache)
    layer_norm._ops = LayerNorm()
    return {
        "stock": StockForward(loaded[0].model, cache),
        "lean": LeanForward(loaded[1].model, cache, packed=False),
        "packed": with_rows(chosen, 0),
        "four_bit": with_rows(chosen, BATCHES[-1]),
        "chosen": chosen,
        "layer_norm": layer_norm,
        "compiled": compiled,
        "compiled_packed": with_rows(compiled, 0),
    }


def with_kernels(cache: PagedKVCache) -> PagedKVCache:
    """The same memory, read by the compiled kernel."""
    other = copy.copy(cache)
    other.kernels = Kernels(decode=paged_decode)
    return other


def with_rows(forward: LeanForward, max_narrow_rows: int) -> Forward:
    """The same layers with another choice of kinds."""

    def choose(linear: Any) -> Any:
        if not isinstance(linear, ByRows):
            return linear
        chosen = copy.copy(linear)
        chosen.max_narrow_rows = max_narrow_rows
        return chosen

    other = copy.copy(forward)
    other._head = choose(forward._head)
    other._layers = []
    for layer in forward._layers:
        changed = copy.copy(layer)
        for name in ("qkv", "out", "gate_up", "down"):
            object.__setattr__(changed, name, choose(getattr(layer, name)))
        other._layers.append(changed)
    return other


def measure(forwards: dict[str, Forward], cache: PagedKVCache, batch: int, num_turns: int) -> dict[str, list[Seconds]]:
    """What a step of each variant took, turn by turn."""
    plain, compiled = decode_step(batch, cache), decode_step(batch, with_kernels(cache))
    steps = {name: compiled if name.startswith("compiled") else plain for name in forwards}
    times: dict[str, list[Seconds]] = {name: [] for name in forwards}
    with torch.inference_mode():
        for turn in range(num_turns + 2):
            for name, forward in forwards.items():
                seconds = cost(lambda forward=forward, name=name: forward(*steps[name]))
                if turn >= 2:  # the first warm up
                    times[name].append(seconds)
    return times


def cost(run: Callable[[], Any]) -> Seconds:
    run()  # brings back what the variant before has driven out of the caches
    wall, processor = time.perf_counter(), time.process_time()
    run()
    run()
    return Seconds((time.perf_counter() - wall) / 2, (time.process_time() - processor) / 2)


def decode_step(num_streams: int, cache: PagedKVCache) -> tuple[Tensor, Tensor, StepLayout, Tensor]:
    """A step of so many streams, each with a context of CONTEXT tokens in blocks of its own."""
    batch, num_blocks = Batch(), CONTEXT // BLOCK_SIZE
    for key in range(num_streams):
        request = EngineRequest(key=key, prompt_ids=(0,) * CONTEXT, params=SamplingParams(max_new_tokens=1))
        sequence = Sequence.from_request(request, key, frozenset(), CONTEXT + 1)
        sequence.block_ids.extend(range(key * num_blocks, (key + 1) * num_blocks))
        sequence.num_computed_tokens = CONTEXT - 1
        batch.add(sequence, 1)
    batch.num_decodes = num_streams
    positions = torch.full((num_streams,), CONTEXT - 1)
    return torch.randint(0, 1000, (num_streams,)), positions, StepLayout.of(batch, cache), torch.arange(num_streams)


if __name__ == "__main__":
    main()
