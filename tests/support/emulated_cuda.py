"""A CUDA device for tests where there is none: tensors that say they are on cuda:0, computed with on the CPU.

What CUDA refuses is refused: an operator on tensors of both devices. What waits for the device raises while
`torch.cuda.set_sync_debug_mode("error")` is on, and in a capture. New memory holds rubbish, and so does a copy to the
host until the event behind it is waited for. Graphs run again what was captured, from and into the same tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

_aten = torch.ops.aten
_WAITING = {
    _aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten._unique2, _aten.unique_dim, _aten.equal,
    _aten.unique_consecutive, _aten.bincount, _aten.repeat_interleave,
}  # fmt: skip
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
_EMPTY = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}
_RUBBISH = 101
# Not taken apart: the one would look for a device's own way, and the other for a device.
_WHOLE = {_aten.scaled_dot_product_attention, _aten.is_pinned}


class CudaTensor(Tensor):
    """`on_cpu`: its values, of the same sizes and strides."""

    on_cpu: Tensor
    emulated: EmulatedCuda
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    @torch.inference_mode(False)  # which views of other tensors have to be
    def __new__(cls, values: Tensor) -> CudaTensor:
        layout: Any = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        made: CudaTensor = Tensor._make_wrapper_subclass(cls, values.size(), **layout, device=torch.device("cuda:0"))
        made.on_cpu = values
        return made

    def data_ptr(self) -> int:
        return self.on_cpu.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    # A torch without CUDA has no guard for the device, which these ask for.
    def copy_(self, source: Tensor, non_blocking: bool = False) -> Any:
        with _disable_current_modes():
            return self.emulated.__torch_dispatch__(_aten.copy_.default, (), (self, source, non_blocking))

    def __float__(self) -> float:
        return float(self.item())

    def __getitem__(self, index: Any) -> Any:
        return self.emulated.index(Tensor.__getitem__, self, index)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.emulated.index(Tensor.__setitem__, self, index, value)

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise NotImplementedError(f"{func} outside of the emulated device")


class EmulatedCuda(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """See `emulated_cuda`."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # so that torch looks for no real device

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.copies: list[tuple[Tensor, Tensor]] = []  # to the host, on their way
        self.num_held_bytes = 2**28  # by torch, for whoever asks next
        self._captured: list[Callable[[], None]] | None = None
        self.raises = False
        self._warns = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which would import it

    def set_sync_debug_mode(self, mode: str) -> None:
        """As torch does: the first time it warns, and the mode is set all the same."""
        self.raises = mode == "error"
        if self._warns:
            self._warns = False
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)

    def empty_cache(self) -> None:
        self.num_held_bytes = 0

    @contextmanager
    def graph(self, graph: MagicMock, pool: Any, stream: Any = None) -> Iterator[None]:
        self.empty_cache()
        captured: list[Callable[[], None]] = []
        self._captured = captured
        graph.replay.side_effect = lambda: [run() for run in captured]
        try:
            yield
        finally:
            self._captured = None

    def run(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """On the CPU: what is given tensors of the device, and makes some."""
        wrappers = {id(one.on_cpu): one for one in tree_leaves((args, kwargs)) if isinstance(one, CudaTensor)}
        args, kwargs = tree_map_only(CudaTensor, lambda one: one.on_cpu, (args, kwargs))
        made = func(*args, **kwargs)
        if self._captured is not None:
            outputs = [one for one in tree_leaves(made) if isinstance(one, Tensor)]

            def again() -> None:
                for output, new in zip(outputs, tree_leaves(func(*args, **kwargs)), strict=False):
                    output.copy_(new)

            self._captured.append(again)
        return tree_map_only(Tensor, lambda one: wrappers[id(one)] if id(one) in wrappers else CudaTensor(one), made)

    def index(self, func: Callable[..., Any], of: CudaTensor, index: Any, *value: Any) -> Any:
        self._check(func, index if isinstance(index, tuple) else (index,), value)
        with _disable_current_modes():
            return self.run(func, (of, index, *value), {})

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, packet = dict(kwargs or {}), func.overloadpacket
        if packet not in _WHOLE and func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        if packet is _aten.is_pinned:
            return hasattr(args[0], "is_in_pinned_memory")
        if packet is _aten._pin_memory:
            pinned = args[0].clone()
            pinned.is_in_pinned_memory = True
            return pinned
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        is_cuda = any(isinstance(one, CudaTensor) for one in tensors)
        if kwargs.get("device") is not None:
            is_cuda = torch.device(kwargs["device"]).type == "cuda"
            kwargs["device"] = "cpu"
        if packet in (_aten._to_copy, _aten.copy_):
            is_to_cuda = is_cuda if packet is _aten._to_copy else isinstance(args[0], CudaTensor)
            if is_to_cuda != isinstance(args[:2][-1], CudaTensor):
                return self._copy(func, args, kwargs, is_to_cuda)
        if not is_cuda:
            return func(*args, **kwargs)
        indices = args[1] if packet in _INDEXING else []
        self._check(func, indices, [one for one in tensors if all(one is not index for index in indices)])
        if packet in _WAITING:
            self._wait(func)
        if packet is _aten._local_scalar_dense:
            return args[0].on_cpu.item()
        made = self.run(func, args, kwargs)
        if packet in _EMPTY:
            made.on_cpu.fill_(torch.nan if made.is_floating_point() else _RUBBISH)
        return made

    def _copy(self, func: OpOverload, args: Any, kwargs: Any, is_to_cuda: bool) -> Any:
        source, is_on_its_way = args[:2][-1], kwargs.get("non_blocking") or args[2:] == (True,)
        is_pageable = is_to_cuda and not hasattr(source, "is_in_pinned_memory")
        if is_pageable or not is_on_its_way or self._captured is not None:
            self._wait(func)
        values = func(*tree_map_only(CudaTensor, lambda one: one.on_cpu, args), **kwargs)
        if is_to_cuda:
            return CudaTensor(values) if func is _aten._to_copy.default else args[0]
        if is_on_its_way:
            self.copies.append((values, values.clone()))
            values.fill_(_RUBBISH)
        return values

    def _check(self, func: Any, indices: Any, others: Any) -> None:
        """Indices may be on the host, or masks, but wait; of anything else only numbers may be there."""
        if any(not isinstance(one, CudaTensor) and one.dim() for one in others if isinstance(one, Tensor)):
            raise RuntimeError(f"Expected all tensors to be on the same device: {func}")
        wanted = [one for one in indices if isinstance(one, Tensor | list)]
        if any(not isinstance(one, CudaTensor) or one.dtype == torch.bool for one in wanted):
            self._wait(func)

    def _wait(self, func: Any) -> None:
        if self.raises or self._captured is not None:
            raise RuntimeError(f"called a synchronizing CUDA operation: {func}")


class _Event:
    """Whoever waits for it finds the copies done that were made before it was recorded."""

    def record(self) -> None:
        self._copies, CudaTensor.emulated.copies = CudaTensor.emulated.copies, []

    @torch.inference_mode()
    def synchronize(self) -> None:
        for target, values in self._copies:
            target.copy_(values)


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls)


@contextmanager
def emulated_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmulatedCuda]:
    """A device, and torch.cuda as if it were there."""
    CudaTensor.emulated = device = EmulatedCuda()
    emulated: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: 1, "set_device": MagicMock(), "Event": _Event,
        "mem_get_info": lambda *_: (2**30 - device.num_held_bytes, 2**31), "empty_cache": device.empty_cache,
        "Stream": MagicMock(), "current_stream": MagicMock(), "stream": nullcontext, "CUDAGraph": MagicMock,
        "graph": device.graph, "graph_pool_handle": MagicMock(), "set_sync_debug_mode": device.set_sync_debug_mode,
        "synchronize": MagicMock(), "get_device_name": lambda *_: "emulated",
    }  # fmt: skip
    for name, one in emulated.items():
        monkeypatch.setattr(torch.cuda, name, one)
    monkeypatch.setattr(torch, "Generator", _Generator)
    # Else a module's parameters would keep their type.
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    torch._C._ensureCUDADeviceGuardSet()
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with device:
            yield device
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
