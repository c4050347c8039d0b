"""The quantised weights of a .gguf file as they stand: kept beside a conversion, and read as 4-bit numbers.

Formats: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h (block_q4_0, block_q4_1, block_q8_0).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from parleyd.errors import StartupError
from parleyd.model import explain
from parleyd.model.cache import cache_root

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_logger = logging.getLogger("parleyd.model")

FILE_NAME = "gguf_blocks.safetensors"
BLOCK_SIZE = 32  # weights of a row that share a scale

_KINDS = ("Q4_0", "Q4_1", "Q8_0")
_Q4_0_BYTES, _Q4_1_BYTES, _Q8_0_BYTES = 18, 20, 34  # of a block, all three of BLOCK_SIZE weights


@dataclass(frozen=True)
class Numbers:
    """A matrix `[out, in]` as the sum of planes, side by side: `(number - 8) * scale + zero` is a plane's part.

    `numbers`: `[out, planes * in]`, 0 to 15. `scales`, `zeros`: float32 `[out, planes * in / BLOCK_SIZE]`.
    4-bit weights have one plane; 8-bit ones have two, for their high and their low half.
    """

    numbers: Tensor
    scales: Tensor
    zeros: Tensor
    num_planes: int

    def as_whole(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """The planes in one, a weight being `number * scale + minimum`: numbers, uint8 `[out, in]`; scales and minima,
        `[out, in / BLOCK_SIZE]`; and the bits of a number, 4 or 8."""
        if self.num_planes == 1:
            return self.numbers, self.scales, self.zeros - 8 * self.scales, 4
        (high, low), scales = self.numbers.chunk(2, 1), self.scales.chunk(2, 1)[1]
        return high << 4 | low, scales, -128 * scales, 8

    def dequantised(self) -> Tensor:
        """The matrix, float32."""
        grouped = self.numbers.view(len(self.numbers), -1, BLOCK_SIZE).float()
        planes = (grouped - 8) * self.scales[..., None] + self.zeros[..., None]
        return planes.view(len(planes), self.num_planes, -1).sum(1)


def concatenated(parts: Sequence[Numbers | None]) -> Numbers | None:
    """Matrices of one input as one, by rows; None where one is missing or of another width."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or len({part.num_planes for part in known}) > 1:
        return None
    return Numbers(
        torch.cat([part.numbers for part in known]),
        torch.cat([part.scales for part in known]),
        torch.cat([part.zeros for part in known]),
        known[0].num_planes,
    )


class GgufBlocks:
    """The blocks that a converted model's weights came from."""

    def __init__(self, path: Path) -> None:
        self.num_bytes = path.stat().st_size
        file: Any = safe_open(path, framework="pt")
        self._file, self._names = file, set(file.keys())

    def numbers_of(self, name: str, width: int) -> Numbers | None:
        """Those of the weights of this name, `[out, width]`; None where the file has them in another format."""
        return _decode(self._file.get_tensor(name), width) if name in self._names else None


def open_blocks(folder: Path, cache: str | None) -> GgufBlocks | None:
    """The blocks of the model in `folder`; None where that is no conversion of such a file.

    Raises StartupError where they cannot be read.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    # A folder in the cache may be a link, and one may lead there. Elsewhere, the weights may have been changed since.
    if cache_root(cache).resolve() not in (folder.parent.resolve(), folder.resolve().parent):
        _logger.warning("%s is not read, as it is not in --cache: for weights in 4 bits, serve the .gguf file", path)
        return None
    try:
        return GgufBlocks(path)
    except (OSError, SafetensorError) as error:
        raise StartupError(f"{path} cannot be read: {explain.one_line(error)}") from error


def read_blocks(gguf_file: Path, model: PreTrainedModel) -> dict[str, Tensor]:
    """The blocks of `gguf_file` that we can read, with the names and the order of rows of the model read from it."""
    import gguf

    reader = gguf.GGUFReader(str(gguf_file))
    names = _gguf_names(model, reader)
    blocks = {}
    for tensor in reader.tensors:
        weight = names.get(tensor.name)
        if weight is None or tensor.tensor_type.name not in _KINDS:
            continue
        name, parameter = weight
        orders = _row_orders(model, parameter)
        if (rows := next((rows for rows in orders if _is(tensor.data, rows, parameter)), None)) is not None:
            blocks[name] = torch.from_numpy(tensor.data[rows])
    return blocks


def num_block_bytes(reader: Any) -> int:
    """What `read_blocks` may return of a file, beside the model."""
    return sum(int(tensor.n_bytes) for tensor in reader.tensors if tensor.tensor_type.name in _KINDS)


def save_blocks(blocks: dict[str, Tensor], folder: Path) -> None:
    """Keeps what `read_blocks` returned for `open_blocks`."""
    if blocks:
        save_file(blocks, folder / FILE_NAME)


def _gguf_names(model: PreTrainedModel, reader: Any) -> dict[str, tuple[str, Tensor]]:
    """By the tensors' names in the file: ours, and the parameter."""
    import gguf

    kind = reader.fields["general.architecture"].contents()
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(architecture, model.config.get_text_config().num_hidden_layers)
    return {
        f"{names.get_name(name.removesuffix('.weight'))}.weight": (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2
    }


def _row_orders(model: PreTrainedModel, parameter: Tensor) -> Iterator[NDArray[np.int64]]:
    """How a file may order a matrix's rows: as they are, or with the halves of each head interleaved."""
    config: Any = model.config.get_text_config()
    rows = np.arange(parameter.shape[0])
    yield rows
    for num_heads in {config.num_attention_heads, config.num_key_value_heads}:
        if len(rows) % (2 * num_heads) == 0:
            yield rows.reshape(num_heads, -1, 2).transpose(0, 2, 1).ravel()


def _is(data: NDArray[np.uint8], rows: NDArray[np.int64], parameter: Tensor) -> bool:
    """Whether that is what transformers made of these blocks in this order. Some suffice, as it is right or wrong."""
    # An odd step: even ones may meet only rows that all orders have in the same place.
    some = slice(0, None, len(rows) // 128 | 1)
    weight = parameter.detach()[some].float()
    blocks = torch.from_numpy(data[rows[some]])
    return torch.allclose(_decode(blocks, weight.shape[1]).dequantised(), weight, atol=0.01 * float(weight.abs().max()))


def _decode(blocks: Tensor, width: int) -> Numbers:
    """`blocks`: uint8 `[out, bytes]`, of a matrix `[out, width]`."""
    grouped = blocks.view(len(blocks), width // BLOCK_SIZE, -1)
    block_bytes = grouped.shape[2]
    scales = _floats(grouped[..., :2])
    if block_bytes == _Q8_0_BYTES:
        numbers = grouped[..., 2:].view(torch.int8).flatten(1)
        high, low = (numbers >> 4) + 8, numbers & 15
        planes = torch.cat([high, low], 1).to(torch.uint8)
        return Numbers(planes, torch.cat([16 * scales, scales], 1), torch.cat([0 * scales, 8 * scales], 1), 2)
    assert block_bytes in (_Q4_0_BYTES, _Q4_1_BYTES), block_bytes
    # The first half of a block's weights lies in the low halves of its bytes.
    packed = grouped[..., block_bytes - BLOCK_SIZE // 2 :]
    numbers = torch.cat([packed & 15, packed >> 4], -1).flatten(1)
    zeros = torch.zeros_like(scales) if block_bytes == _Q4_0_BYTES else _floats(grouped[..., 2:4]) + 8 * scales
    return Numbers(numbers, scales, zeros, 1)


def _floats(two_bytes: Tensor) -> Tensor:
    """float16 as it lies in a block, `[..., 2]` bytes, as float32 `[...]`."""
    return two_bytes.contiguous().view(torch.float16).squeeze(-1).float()
