"""Torch's threads on a processor each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

PROGRAM = """
import json, os, sys
import torch
from parleyd.cpu_kernels.openmp import bind_threads

def affinities():
    cpus = [sorted(os.sched_getaffinity(int(task))) for task in os.listdir("/proc/self/task")]
    return sorted(allowed[0] for allowed in cpus if len(allowed) == 1)

torch.set_num_threads(int(sys.argv[1]))
x = torch.randn(512, 512)
product = x @ x  # starts the threads
is_bound = bind_threads()
same = torch.equal(x @ x, product)
print(json.dumps({"is_bound": is_bound, "bound": affinities(), "num_threads": torch.get_num_threads(), "same": same}))
"""
CPUS = sorted(os.sched_getaffinity(0))

pytestmark = pytest.mark.skipif(len(CPUS) < 2, reason="needs two processors")


def run(num_threads: int, **environ: str) -> dict[str, Any]:
    environ = {**os.environ, **environ}
    command = [sys.executable, "-c", PROGRAM, str(num_threads)]
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, check=True, timeout=60)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_as_many_threads_as_processors_have_one_each() -> None:
    assert run(len(CPUS)) == {"is_bound": True, "bound": CPUS, "num_threads": len(CPUS), "same": True}


def test_fewer_threads_are_left_to_the_kernel() -> None:
    assert run(len(CPUS) - 1) == {"is_bound": False, "bound": [], "num_threads": len(CPUS) - 1, "same": True}


def test_threads_that_are_bound_already_stay_where_they_are() -> None:
    assert not run(len(CPUS), OMP_PROC_BIND="true")["is_bound"]
