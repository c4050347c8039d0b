"""Where weights are put."""

from __future__ import annotations

import pytest
import torch

from parleyd.model.memory import placement

GIB = 2**30


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The free memory of each GPU that there seems to be, in GiB."""
    sizes: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(sizes))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(sizes))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (sizes[gpu] * GIB, 80 * GIB))
    return sizes


@pytest.mark.parametrize(
    ("sizes", "asked", "placed"),
    [
        ([40, 70, 70], "auto", "cuda:1"),
        ([20, 18], "auto", "auto"),  # no room for a KV cache on either
        ([70, 70], "balanced", "balanced"),
        ([70, 70], "cuda:0", "cuda:0"),
        ([70], "auto", "auto"),
        ([], "auto", "auto"),
    ],
)
def test_a_model_goes_onto_one_gpu_where_that_has_room(
    free: list[int], sizes: list[int], asked: str, placed: str
) -> None:
    free += sizes
    assert placement(asked, 17 * GIB) == placed
