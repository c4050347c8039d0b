"""The compiled kernels in their place: when an engine takes them, that they are kept, and that it answers with them."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from numba import config

from parleyd.cpu_kernels import layers, threads, trial
from parleyd.cpu_kernels.decode import paged_decode
from parleyd.kernels.choice import AttentionShape, choose_kernels
from parleyd.kernels.compiled import CompiledKernels, compiled_kernels
from parleyd.kernels.paged import NO_KERNELS

COMPILED = CompiledKernels(paged_decode, layers)


@pytest.fixture(autouse=True)
def cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is set for all of this process is set back."""
    for name in ("CACHE_DIR", "CACHE_LOCATOR_CLASSES"):
        monkeypatch.setattr(config, name, getattr(config, name))


def shape(**values: Any) -> AttentionShape:
    return AttentionShape(
        **{"num_layers": 1, "num_heads": 8, "num_kv_heads": 8, "head_dim": 16, "dtype": torch.bfloat16,
           "device": torch.device("cpu"), "max_context_tokens": 500, **values}
    )  # fmt: skip


def test_a_compiled_kernel_that_passes_its_trial_is_chosen_unless_another_is_asked_for() -> None:
    assert choose_kernels("auto", shape(), COMPILED)[0].decode is paged_decode
    assert choose_kernels("gather", shape(), COMPILED)[0] == NO_KERNELS


def test_one_that_attends_to_something_else_is_not(caplog: pytest.LogCaptureFixture) -> None:
    def wrong(query: torch.Tensor, *_: Any) -> torch.Tensor:
        return query + 1

    assert choose_kernels("auto", shape(), CompiledKernels(wrong, layers))[0] == NO_KERNELS
    assert "no compiled kernel for attention" in caplog.text


def test_without_numba_there_are_none_and_the_log_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    assert compiled_kernels(tmp_path, 16) is None
    assert "no compiled kernels" in caplog.text and "numba" in caplog.text


def test_without_gnu_openmp_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> None:
        raise OSError("torch brings no libgomp")

    monkeypatch.setattr(threads, "_openmp", missing)
    for kernel in (layers._norm_kernel, layers._gate_kernel, layers._rotate_kernel):
        monkeypatch.setattr(layers, kernel.__name__, kernel.__wrapped__)  # as in a new process
    assert compiled_kernels(tmp_path, 16) is None
    assert "no libgomp" in caplog.text


def test_where_they_cannot_be_kept_they_are_compiled_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(layers, "_norm_kernel", layers._norm_kernel.__wrapped__)  # as in a new process
    monkeypatch.setattr(trial, "check_products", lambda _: None)  # takes seconds to compile
    (tmp_path / "file").touch()
    assert compiled_kernels(tmp_path / "file", 16)
    assert "kernels are compiled at each start" in caplog.text


def test_on_a_full_disk_they_are_compiled_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for kernel in (layers._norm_kernel, layers._gate_kernel, layers._rotate_kernel):
        monkeypatch.setattr(layers, kernel.__name__, kernel.__wrapped__)  # as in a new process
    monkeypatch.setattr(trial, "check_products", lambda _: None)  # takes seconds to compile
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        assert compiled_kernels(tmp_path, 16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caplog.text.count("kernels are compiled at each start") == 1


def test_layers_that_compute_something_else_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate = layers.gate
    monkeypatch.setattr(layers, "gate", lambda gate_up: gate(gate_up) + 1)
    assert compiled_kernels(tmp_path, 16) is None
    assert "something else" in caplog.text


def test_what_has_been_compiled_is_kept_and_found_again(tmp_path: Path) -> None:
    """In processes of their own: this one may have compiled them already. Also where it can be read alone."""
    code = """
import pathlib, sys
from parleyd.cpu_kernels.decode import attend_head
from parleyd.kernels.compiled import CompiledKernels, compiled_kernels
assert compiled_kernels(pathlib.Path(sys.argv[1]), 64)
attend_head(3, 64, 32)
"""

    def compiled(before: str = "") -> dict[Path, int]:
        subprocess.run([sys.executable, "-c", before + code, str(tmp_path)], check=True)
        return {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}

    first = compiled()
    assert {file.suffix for file in first} == {".nbc", ".nbi"}
    # With which numba tries whether it can write.
    assert compiled("import tempfile; tempfile.TemporaryFile = None") == first
