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

from parleyd.worker.openmp import openmp_variables

os.environ.update(openmp_variables(os.environ))  # as in the worker; must be there before torch

import torch
from torch import Tensor

from benchmarks.environment import describe
from parleyd.config import ModelSettings
from parleyd.cpu_kernels import layers as compiled_layers
from parleyd.cpu_kernels.decode import paged_decode
from parleyd.engine.lean_forward import LeanForward
from parleyd.engine.model_runner import Forward
from parleyd.engine.stock_forward import StockForward
from parleyd.generation import EngineRequest, SamplingParams
from parleyd.kernels.cache import PagedKVCache
from parleyd.kernels.compiled import CompiledKernels
from parleyd.kernels.layout import StepLayout
from parleyd.kernels.paged import Kernels
from parleyd.model.lean_model import LeanModel
from parleyd.model.linear.by_rows import ByRows
from parleyd.model.loader import LoadedModel, load_model
from parleyd.scheduling.request import Batch, Sequence

RESULTS = Path(__file__).parent / "results" / "layers.json"
BATCHES = (1, 4, 16, 64)
CONTEXT, BLOCK_SIZE = 160, 32
# Each row: a variant, and the one that its gain is told against.
GAINS = (
    ("lean", "stock"),
    ("packed", "lean"),
    ("four_bit", "packed"),
    ("kernels", "packed"),
    ("decoder", "kernels"),
    ("blocks", "decoder"),
    ("blocks", "packed"),
)
# A model for each of these; the others share theirs.
MODELS = ("stock", "lean", "packed", "four_bit", "decoder", "blocks")


class Seconds(NamedTuple):
    """Of a step."""

    wall: float
    processor: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--json", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    loaded = {name: load_model(ModelSettings()) for name in MODELS}
    cache = build_cache(loaded["stock"])
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


def build_variants(loaded: dict[str, LoadedModel], cache: PagedKVCache) -> dict[str, Forward]:
    """By name."""
    compiled, by_block = CompiledKernels(paged_decode, compiled_layers), with_kernels(cache)
    lean = {name: LeanModel.of(loaded[name].model) for name in MODELS if name != "stock"}
    decoder = LeanForward(lean["decoder"], by_block, compiled=compiled)
    kernel_by_kernel = copy.copy(decoder)
    kernel_by_kernel._decoder = None
    four_bit = LeanForward(lean["four_bit"], cache, blocks=loaded["four_bit"].blocks)
    use_four_bits(four_bit)
    return {
        "stock": StockForward(loaded["stock"].model, cache),
        "lean": LeanForward(lean["lean"], cache, packed=False),
        "packed": LeanForward(lean["packed"], cache),
        "four_bit": four_bit,
        "kernels": kernel_by_kernel,
        "decoder": decoder,
        "blocks": LeanForward(lean["blocks"], by_block, blocks=loaded["blocks"].blocks, compiled=compiled),
    }


def with_kernels(cache: PagedKVCache) -> PagedKVCache:
    """The same memory, read by the compiled kernel."""
    other = copy.copy(cache)
    other.kernels = Kernels(decode=paged_decode)
    return other


def use_four_bits(forward: LeanForward) -> None:
    """Torch's 4-bit kernel, whatever the number of rows."""
    linears = [getattr(layer, name) for layer in forward._layers for name in ("qkv", "out", "gate_up", "down")]
    for linear in (*linears, forward._head):
        assert isinstance(linear, ByRows)
        linear.max_narrow_rows = BATCHES[-1]


def measure(forwards: dict[str, Forward], cache: PagedKVCache, batch: int, num_turns: int) -> dict[str, list[Seconds]]:
    """What a step of each variant took, turn by turn."""
    plain, compiled = decode_step(batch, cache), decode_step(batch, with_kernels(cache))
    steps = {name: compiled if name in ("kernels", "decoder", "blocks") else plain for name in forwards}
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
        sequence = Sequence(request, key, frozenset(), CONTEXT + 1)
        sequence.block_ids.extend(range(key * num_blocks, (key + 1) * num_blocks))
        sequence.num_computed_tokens = CONTEXT - 1
        batch.add(sequence, 1)
    batch.num_decodes = num_streams
    positions = torch.full((num_streams,), CONTEXT - 1)
    return torch.randint(0, 1000, (num_streams,)), positions, StepLayout.of(batch, cache), torch.arange(num_streams)


if __name__ == "__main__":
    main()
