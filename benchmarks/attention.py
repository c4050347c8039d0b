"""What attention of one layer costs on this processor: compiled, and with blocks gathered, in turns in one process.

`python -m benchmarks.attention`: rows of a prompt behind others, and decoding sequences, in bfloat16. A figure is the
median of its turns, the gain that of the ratios by turn. GFLOP/s: of the two matrix products, whatever is computed
beside them; GB/s: of keys and values, each read once.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

from parleyd.worker.openmp import openmp_variables

os.environ.update(openmp_variables(os.environ))  # as in the worker; must be there before torch

import torch
from tqdm import tqdm

from benchmarks.environment import describe
from parleyd.kernels.cache import PagedKVCache
from parleyd.kernels.choice import probe_batch
from parleyd.kernels.compiled import CompiledKernels, compiled_kernels
from parleyd.kernels.layout import StepLayout, attend_to_written
from parleyd.kernels.paged import BLOCK_SIZE, NO_KERNELS, Kernels
from parleyd.model.cache import cache_root

# (sequences, tokens of each behind which they stand, rows of each)
CASES = (
    (1, 0, 64),
    (1, 0, 512),
    (1, 488, 512),
    (1, 1488, 512),
    (1, 7488, 512),
    (1, 159, 1),
    (16, 159, 1),
    (64, 159, 1),
    (64, 999, 1),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9, help="of each case (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=9, help="of queries (default: %(default)s)")
    parser.add_argument("--kv-heads", type=int, default=3, help="of keys and values (default: %(default)s)")
    parser.add_argument("--head-dim", type=int, default=64, help="numbers of a head (default: %(default)s)")
    arguments = parser.parse_args()
    compiled = compiled_kernels(cache_root(None), arguments.head_dim)
    if compiled is None:
        raise SystemExit("there are no compiled kernels on this processor")
    for name, value in describe().items():
        print(f"- {name}: {value}")
    print("\n| sequences | behind | rows of each | ms | GFLOP/s | GB/s | gathered: ms | gain |\n" + 8 * "|---" + "|")
    for num_sequences, start, num_rows in tqdm(CASES, unit="case", leave=False, disable=None):
        own, gathered = measure(arguments, compiled, num_sequences, start, num_rows)
        seconds, num_tokens = statistics.median(own), start + num_rows
        num_seen = num_sequences * (num_rows * start + num_rows * (num_rows + 1) / 2)
        flops = 4 * arguments.head_dim * arguments.heads * num_seen
        num_bytes = 4 * arguments.head_dim * arguments.kv_heads * num_sequences * num_tokens
        gain = statistics.median(other / one for one, other in zip(own, gathered, strict=True))
        tqdm.write(
            f"| {num_sequences} | {start} | {num_rows} | {1e3 * seconds:.3f} | {flops / seconds / 1e9:.0f} "
            f"| {num_bytes / seconds / 1e9:.1f} | {1e3 * statistics.median(gathered):.3f} | {gain:.2f} |"
        )


def measure(
    arguments: argparse.Namespace, compiled: CompiledKernels, num_sequences: int, start: int, num_rows: int
) -> tuple[list[float], list[float]]:
    """Seconds, turn by turn: of the compiled kernel, and of gathering."""
    num_decodes = num_sequences if num_rows == 1 else 0
    batch = probe_batch([(start, num_rows)] * num_sequences, BLOCK_SIZE, num_decodes)
    num_blocks = 1 + max(max(item.block_ids) for item in batch.scheduled)
    shape = (1, num_blocks, BLOCK_SIZE, arguments.kv_heads, arguments.head_dim)
    query = torch.randn(batch.num_tokens, arguments.heads, arguments.head_dim).bfloat16()
    ways = []
    for kernels in (Kernels(compiled.decode, takes_prompts=True), NO_KERNELS):
        cache = PagedKVCache(shape, torch.bfloat16, torch.device("cpu"), kernels)
        cache.keys.normal_()
        cache.values.normal_()
        ways.append((cache, StepLayout.of(batch, cache)))
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(arguments.turns + 1):
        for (cache, layout), seconds in zip(ways, times, strict=True):
            started = time.perf_counter()
            attend_to_written(cache, 0, layout, query, arguments.head_dim**-0.5)
            if turn:  # the first warms up
                seconds.append(time.perf_counter() - started)
    return times


if __name__ == "__main__":
    main()
