"""The kernels as compiled for processors that have less than this one: their tests once more, in a process for each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import pytest

# What each lacks, by the beginnings of features' names; this one runs only what it lacks nothing else of.
LACKING = {
    "no matrix unit": ("amx",),
    "no bfloat16": ("amx", "avx512bf16", "avx512fp16"),
    "no VNNI": ("amx", "avx512bf16", "avx512fp16", "avx512vnni", "avxvnni"),
    "no AVX-512": ("amx", "avx512", "avxvnni"),
}
AVAILABLE = frozenset(name for name, is_there in llvm.get_host_cpu_features().items() if is_there)


@pytest.mark.parametrize("lacking", LACKING.values(), ids=LACKING.keys())
def test_the_kernels_compute_the_same(lacking: tuple[str, ...], two_threads: None) -> None:
    left = sorted(name for name in AVAILABLE if not name.startswith(lacking))
    if len(left) == len(AVAILABLE):
        pytest.skip("it lacks no more than this processor, for which all tests run")
    environ = dict(os.environ, NUMBA_CPU_NAME="x86-64", NUMBA_CPU_FEATURES=",".join(f"+{name}" for name in left))
    tests = [str(Path(__file__).parent / name) for name in ("test_products.py", "test_decode.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *tests]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout
