"""The kernels where there is less than here, of instructions or threads: their tests once more, each in a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import pytest

# What each lacks, by the beginnings of LLVM's names for it.
_NO_BFLOAT16 = ("amx", "avx10", "avx512bf16", "avx512fp16")
LACKING = {
    "no matrix unit": ("amx",),
    "no bfloat16": _NO_BFLOAT16,
    "no VNNI": (*_NO_BFLOAT16, "avx512vnni", "avxvnni"),
    "no AVX-512": ("amx", "avx10", "avx512", "avxvnni", "evex512"),
}
AVAILABLE = frozenset(name for name, is_there in llvm.get_host_cpu_features().items() if is_there)


@pytest.mark.timeout(300)  # all is compiled anew
@pytest.mark.parametrize("lacking", LACKING.values(), ids=LACKING.keys())
def test_the_kernels_compute_the_same(lacking: tuple[str, ...]) -> None:
    left = sorted(name for name in AVAILABLE if not name.startswith(lacking))
    if len(left) == len(AVAILABLE):
        pytest.skip("it lacks no more than this processor, for which all tests run")
    run_with(NUMBA_CPU_NAME="x86-64", NUMBA_CPU_FEATURES=",".join(f"+{name}" for name in left))


@pytest.mark.timeout(300)
def test_fewer_threads_than_torch_counts_compute_the_same() -> None:
    run_with(OMP_THREAD_LIMIT="1")


def run_with(**environ: str) -> None:
    """All tests of products and attention, in a process with this environment."""
    tests = [str(Path(__file__).parent / name) for name in ("test_products.py", "test_decode.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=os.environ | environ, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "skipped" not in done.stdout
