"""Quantisation through transformers: by `--quantization` while the weights load, or as the checkpoint itself has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils.import_utils import (
    is_bitsandbytes_available,
    is_compressed_tensors_available,
    is_gptqmodel_available,
    is_optimum_available,
    is_torchao_available,
)

from parleyd.config import ModelSettings
from parleyd.errors import StartupError
from parleyd.model.checkpoint import Checkpoint
from parleyd.model.memory import is_on_cpu

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What transformers needs for each method, as packages are called, and whether that is here.
_PACKAGES: dict[str, dict[str, Callable[[], bool]]] = {
    "awq": {"gptqmodel": is_gptqmodel_available},
    "bitsandbytes": {"bitsandbytes": is_bitsandbytes_available},
    "compressed-tensors": {"compressed-tensors": is_compressed_tensors_available},
    "gptq": {"gptqmodel": is_gptqmodel_available, "optimum": is_optimum_available},
    "torchao": {"torchao": is_torchao_available},
}


def quantization_config(settings: ModelSettings, checkpoint: Checkpoint) -> Any | None:
    """What `from_pretrained` takes for `--quantization`; None leaves it to the checkpoint.

    Raises StartupError where the checkpoint is quantised already, a package is missing or the device cannot do it.
    """
    wanted, method = settings.quantization, _method_of(checkpoint)
    if wanted == "auto":
        if method is not None:
            _check_packages(f"--model {settings.model}: its weights are quantised by {method}", method)
        return None
    if method is not None:
        raise StartupError(
            f"--quantization {wanted}: the weights of {settings.model} are quantised by {method} already; use auto"
        )
    _check_packages(f"--quantization {wanted}", wanted.partition("-")[0])
    return _CONFIGS[wanted](is_on_cpu(settings.device_map))


def unpack(model: PreTrainedModel) -> None:
    """Does now what compressed-tensors leaves to the first forward pass: makes its weights numbers of the model's type.

    They take several times as much memory then, and a KV cache gets its share of what is free after that.
    """
    if hasattr(model, "ct_decompress_hook"):
        device_map = getattr(model, "hf_device_map", None)
        model.hf_quantizer.compressor.decompress_model(model)
        if device_map is not None:  # it is lost on the way, and still says which devices the model is on
            model.hf_device_map = device_map


def _method_of(checkpoint: Checkpoint) -> str | None:
    """The method that config.json names, as transformers calls it."""
    config = checkpoint.config.get("quantization_config")
    return None if not isinstance(config, dict) else str(config.get("quant_method", "unknown"))


def _check_packages(what: str, method: str) -> None:
    missing = [name for name, is_available in _PACKAGES.get(method, {}).items() if not is_available()]
    if missing:
        raise StartupError(f"{what}: it needs {' and '.join(missing)}; run `pip install {' '.join(missing)}`")


def _torchao_int8(is_on_cpu: bool) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _torchao_int4(is_on_cpu: bool) -> Any:
    if is_on_cpu:
        raise StartupError("--quantization torchao-int4: torchao has it for GPUs only; on a CPU use bitsandbytes-4bit")
    from torchao.quantization import Int4WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))


def _bitsandbytes_8bit(is_on_cpu: bool) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def _bitsandbytes_4bit(is_on_cpu: bool) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


_CONFIGS: dict[str, Callable[[bool], Any]] = {
    "torchao-int8": _torchao_int8,
    "torchao-int4": _torchao_int4,
    "bitsandbytes-8bit": _bitsandbytes_8bit,
    "bitsandbytes-4bit": _bitsandbytes_4bit,
}
