"""Where weights are put, and whether they fit there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from parleyd.errors import StartupError
from parleyd.model import memory
from parleyd.model.memory import check_device_map, check_fits, free_main_memory, placement

GIB = 2**30


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The free memory of each GPU that there seems to be, in GiB."""
    sizes: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(sizes))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(sizes))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (sizes[getattr(gpu, "index", gpu)] * GIB, 80 * GIB))
    return sizes


@pytest.mark.parametrize(
    ("sizes", "asked", "placed"),
    [
        ([40, 70, 70], "auto", "cuda:1"),
        ([20, 70], "auto", "cuda:1"),
        ([20, 18], "auto", "auto"),  # no room for a KV cache on either
        ([70, 70], "balanced", "balanced"),
        ([70, 70], "cuda:0", "cuda:0"),
        ([70], "auto", "auto"),
        ([], "auto", "cpu"),  # and not what else accelerate may find
        ([], "balanced", "cpu"),
    ],
)
def test_a_model_goes_onto_one_gpu_where_that_has_room(
    free: list[int], sizes: list[int], asked: str, placed: str
) -> None:
    free += sizes
    assert placement(asked, 17 * GIB) == placed


@pytest.mark.parametrize("device_map", ["mps", "xpu:0", "meta"])
def test_what_is_there_but_neither_a_cpu_nor_cuda_is_refused(monkeypatch: pytest.MonkeyPatch, device_map: str) -> None:
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    with pytest.raises(StartupError, match=f"--device-map {device_map}: no device to serve from"):
        check_device_map(device_map)


@pytest.mark.parametrize(
    ("device_map", "place", "gib"),
    [("auto", "main memory with 2 GPU", 95), ("cuda:1", "cuda:1", 70), ("cpu", "main memory", 5)],
)
def test_weights_must_fit_where_they_are_put(
    free: list[int], monkeypatch: pytest.MonkeyPatch, device_map: str, place: str, gib: int
) -> None:
    free += [20, 70]
    monkeypatch.setattr(memory, "free_main_memory", lambda: 5 * GIB)
    check_fits("a-model", gib * GIB, device_map)
    with pytest.raises(StartupError, match=f"but {place} has {gib}.0 GiB free"):
        check_fits("a-model", gib * GIB + 1, device_map)


@pytest.mark.parametrize(("limited", "expected"), [(7, 7), (2**62, 100), (None, 100), (-3, 0)])
def test_a_limit_counts_where_it_is_nearer(monkeypatch: pytest.MonkeyPatch, limited: int | None, expected: int) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: limited)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=100))
    assert free_main_memory() == expected
