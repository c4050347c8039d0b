"""What the worker adds to the environment before torch is imported."""

from __future__ import annotations

import os
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from parleyd.worker import openmp

BOUND = {"GOMP_SPINCOUNT": "1000", "OMP_PROC_BIND": "true"}
UNBOUND = {"GOMP_SPINCOUNT": "1000"}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which the kernel tells of hyperthreads; there are none at first."""
    path = tmp_path / "active"
    path.write_text("0\n")
    monkeypatch.setattr(openmp, "_HYPERTHREADING", path)
    return path


@pytest.mark.parametrize(
    ("environ", "added"),
    [
        ({}, BOUND),
        ({"OMP_NUM_THREADS": "2"}, UNBOUND),
        ({"MKL_NUM_THREADS": "2"}, UNBOUND),
        ({"OMP_PROC_BIND": "false"}, UNBOUND),
        ({"GOMP_SPINCOUNT": "7"}, {"OMP_PROC_BIND": "true"}),
        ({"OMP_WAIT_POLICY": "passive"}, {"OMP_PROC_BIND": "true"}),
    ],
)
@pytest.mark.usefixtures("machine")
def test_what_the_operator_says_stays(environ: dict[str, str], added: dict[str, str]) -> None:
    assert openmp.openmp_variables(environ) == added


@pytest.mark.usefixtures("machine")
def test_threads_are_not_bound_against_the_settings() -> None:
    assert openmp.openmp_variables({}, bind_threads=False) == UNBOUND


def test_with_two_threads_a_core_there_are_more_processors_than_threads(machine: Path) -> None:
    machine.write_text("1\n")
    assert openmp.openmp_variables({}) == UNBOUND


@pytest.fixture(params=[(4, 8), (8, 4), (None, 4)])
def four_cores(machine: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """With hyperthreads, on some of the machine's, and where the kernel does not tell."""
    num_cores, num_processors = request.param
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: num_processors if logical else num_cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(num_processors)))


@pytest.mark.parametrize(("quota", "num_threads"), [(0.5, "1"), (1.0, "1"), (2.9, "2"), (3.0, "3")])
@pytest.mark.usefixtures("four_cores")
def test_a_quota_has_no_more_threads_than_it_keeps_busy(quota: float, num_threads: str) -> None:
    assert openmp.openmp_variables({}, cpu_quota=quota) == {**UNBOUND, "OMP_NUM_THREADS": num_threads}
    assert openmp.openmp_variables({"OMP_NUM_THREADS": "4"}, cpu_quota=quota) == UNBOUND


@pytest.mark.parametrize("quota", [4.0, 64.0, None])
@pytest.mark.usefixtures("four_cores")
def test_a_quota_for_all_cores_changes_nothing(quota: float | None) -> None:
    assert openmp.openmp_variables({}, cpu_quota=quota) == BOUND


def test_without_a_quota_nobody_asks_for_what_linux_alone_tells(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.unlink()
    monkeypatch.delattr(os, "sched_getaffinity")
    assert openmp.openmp_variables({}) == UNBOUND


def test_where_the_kernel_does_not_tell_nothing_is_bound(machine: Path) -> None:
    machine.unlink()
    assert openmp.openmp_variables({}) == UNBOUND
