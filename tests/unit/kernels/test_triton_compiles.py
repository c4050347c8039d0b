"""Triton's compiler needs no GPU: our kernels become machine code for Ampere and Hopper, with tensor cores
where types allow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own: in this one, Triton may have been told to interpret.
SCRIPT = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from parleyd.gpu_kernels import triton_decode

dtype, (group, dim, capability) = sys.argv[1], map(int, sys.argv[2:])
pointers = {"lengths": "*i32", "table": "*i32", "partial": "*fp32", "weights": "*fp32"}
sizes = {"NUM_HEADS": 4 * group, "GROUP": group, "PADDED_GROUP": triton_decode._padded(group), "HEAD_DIM": dim,
         "PADDED_DIM": triton_decode._padded(dim), "BLOCK_SIZE": 32, "SPLIT": 256, "TILE": 64, "NUM_SPLITS": 32}
for kernel in (triton_decode._attend_split, triton_decode._combine_splits):
    types = {name: "constexpr" if name.isupper() else "fp32" if name == "scale" else "i32" if "stride" in name
             else pointers.get(name, "*" + dtype) for name in kernel.arg_names}
    constants = {name: sizes[name] for name in kernel.arg_names if name in sizes}
    compiled = triton.compile(ASTSource(kernel, types, constexprs=constants), target=GPUTarget("cuda", capability, 32))
    print(kernel.__name__, len(compiled.asm["cubin"]), "mma" in compiled.asm["ptx"])
"""


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "group", "dim"), [("bf16", 7, 128), ("bf16", 1, 80), ("fp16", 4, 64), ("fp32", 2, 8)]
)
def test_the_decode_kernels_compile_for_a_gpu(
    dtype: str, group: int, dim: int, capability: int, tmp_path: Path
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT, dtype, str(group), str(dim), str(capability)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    (name, size, has_mma), (other_name, other_size, _) = map(str.split, result.stdout.splitlines())
    assert (name, other_name) == ("_attend_split", "_combine_splits") and int(size) > 0 < int(other_size)
    assert has_mma == str(dtype != "fp32")
