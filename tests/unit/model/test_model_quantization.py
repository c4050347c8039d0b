"""`--quantization` and checkpoints that are quantised: what runs here, and one line for what does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from parleyd.config import ModelSettings
from parleyd.generation import EngineRequest, SamplingParams
from parleyd.model import quantization
from parleyd.model.loader import LoadedModel, load_model
from parleyd.worker.build import build_engine
from tests.unit.model.conftest import edit_json, startup_error, write_llama

# How AWQ's files have the columns of eight in a row.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
METHODS = {"torchao-int8": "torchao", "bitsandbytes-8bit": "bitsandbytes", "bitsandbytes-4bit": "bitsandbytes"}


def greedy_ids(loaded: LoadedModel, settings: ModelSettings, prompt: list[int]) -> list[int]:
    name, engine = build_engine(settings, loaded.model, loaded.info, loaded.blocks)
    assert name == settings.engine
    engine.submit(EngineRequest(key=1, prompt_ids=tuple(prompt), params=SamplingParams(max_new_tokens=8)))
    outputs = engine.step()
    while not outputs[-1].is_last:
        outputs += engine.step()
    assert outputs[-1].error is None
    return [token_id for output in outputs for token_id in output.token_ids]


def check_serves(loaded: LoadedModel, settings: ModelSettings, plain_folder: Path) -> None:
    plain = load_model(ModelSettings(model=str(plain_folder))).model
    prompt = list(range(5, 25))
    with torch.inference_mode():
        ours, exact = loaded.model(torch.tensor([prompt])).logits, plain(torch.tensor([prompt])).logits
    assert 0 < (ours - exact).abs().max() < 0.2 * exact.abs().max()  # it is quantised, and still the same model
    ids = greedy_ids(loaded, settings, prompt)
    loaded.model.set_attn_implementation("sdpa")  # its own again
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([prompt + ids[:-1]])).logits[0, len(prompt) - 1 :]
    chosen = logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
    # The best, or as good as it: which of two that nearly tie comes out is a matter of rounding.
    assert (logits.amax(-1) - chosen).max() <= 0.02 * logits.abs().max()


def write_compressed(plain: Path, folder: Path, scheme: str) -> Path:
    """The same model with the linear layers of its decoder compressed as compressed-tensors' `scheme` has it."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    shutil.copytree(plain, folder)
    model = AutoModelForCausalLM.from_pretrained(plain)
    groups = {"group_0": preset_name_to_scheme(scheme, ["Linear"])}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            weights = module.weight.detach().unflatten(1, (module.weight_scale.shape[1], -1))
            scale, _ = calculate_qparams(weights.amin(-1), weights.amax(-1), module.quantization_scheme.weights)
            module.weight_scale.data.copy_(scale)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return folder


def write_packed(plain: Path, folder: Path, method: str) -> Path:
    """The same model with the linear layers of its decoder in 4 bits, as files of GPTQ or AWQ have them: rounded to the
    nearest, a scale and a zero for each 32 inputs of an output."""
    shutil.copytree(plain, folder)
    weights: dict[str, Tensor] = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            weights[name] = weight
            continue
        layer, groups = name.removesuffix("weight"), weight.float().unflatten(1, (-1, 32))
        scales = (groups.amax(-1) - groups.amin(-1)) / 15
        zeros = (-groups.amin(-1) / scales).round()
        codes = (groups / scales[:, :, None] + zeros[:, :, None]).round().clamp(0, 15).flatten(1)
        weights[f"{layer}scales"] = scales.T.half().contiguous()
        if method == "gptq":
            weights[f"{layer}qweight"] = pack(codes).T.contiguous()
            weights[f"{layer}qzeros"] = pack(zeros.T - 1)
            weights[f"{layer}g_idx"] = torch.arange(weight.shape[1], dtype=torch.int32) // 32
        else:
            weights[f"{layer}qweight"] = pack(codes.T, AWQ_ORDER)
            weights[f"{layer}qzeros"] = pack(zeros.T, AWQ_ORDER)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    own = {"gptq": {"desc_act": False, "sym": False}, "awq": {"zero_point": True, "version": "gemm"}}[method]
    edit_json(folder / "config.json", quantization_config={"quant_method": method, "bits": 4, "group_size": 32, **own})
    return folder


def pack(values: Tensor, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> Tensor:
    """Eight 4-bit numbers of a row in each 32-bit one, the first of `order` lowest."""
    eights = values.int().unflatten(1, (-1, 8))[:, :, list(order)]
    return (eights << torch.arange(0, 32, 4)).sum(-1, dtype=torch.int32)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("method", METHODS)
def test_weights_quantised_at_load_serve_in_engine_batching(method: str, tmp_path: Path) -> None:
    pytest.importorskip(METHODS[method])
    folder = write_llama(tmp_path / "tiny-llama", hidden_size=64, intermediate_size=128)
    settings = ModelSettings(model=str(folder), quantization=method, device_map="cpu")
    loaded = load_model(settings)
    check_serves(loaded, settings, folder)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("scheme", ["W4A16", "W8A16", "W8A8", "FP8_DYNAMIC"])
def test_compressed_tensors_serve_in_engine_batching(scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    plain = write_llama(tmp_path / "tiny-llama", hidden_size=128, intermediate_size=128)
    folder = write_compressed(plain, tmp_path / "compressed", scheme)
    settings = ModelSettings(model=str(folder), device_map="cpu")
    loaded = load_model(settings)
    num_bytes = loaded.model.get_memory_footprint()
    check_serves(loaded, settings, plain)
    assert loaded.model.get_memory_footprint() == num_bytes  # beside which the KV cache was given its share


@pytest.mark.timeout(600)  # gptqmodel compiles its kernel for this processor, once
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_gptq_and_awq_serve_in_engine_batching(method: str, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel")
    if method == "gptq":
        pytest.importorskip("optimum")
    plain = write_llama(tmp_path / "tiny-llama", hidden_size=128, intermediate_size=128)
    settings = ModelSettings(model=str(write_packed(plain, tmp_path / method, method)), device_map="cpu")
    check_serves(load_model(settings), settings, plain)


@pytest.mark.parametrize(
    ("method", "packages"),
    [("awq", "gptqmodel"), ("gptq", "gptqmodel optimum"), ("compressed-tensors", "compressed-tensors")],
)
def test_a_quantised_checkpoint_names_the_package_that_is_missing(
    method: str, packages: str, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_missing(monkeypatch, method)
    edit_json(llama_folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    message = startup_error(llama_folder)
    assert f"its weights are quantised by {method}" in message
    assert f"pip install {packages}" in message


@pytest.mark.parametrize("flag", ["torchao-int8", "bitsandbytes-4bit"])
def test_the_flag_names_the_package_that_is_missing(
    flag: str, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = METHODS[flag]
    pretend_missing(monkeypatch, package)
    message = startup_error(llama_folder, quantization=flag)
    assert message == f"--quantization {flag}: it needs {package}; run `pip install {package}`"


def test_what_is_quantised_is_not_quantised_again(llama_folder: Path) -> None:
    edit_json(llama_folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "are quantised by gptq already; use auto" in startup_error(llama_folder, quantization="torchao-int8")


def test_what_needs_a_gpu_says_so(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(quantization._PACKAGES, "torchao", {"torchao": lambda: True})
    message = startup_error(llama_folder, quantization="torchao-int4", device_map="cpu")
    assert message.startswith("--quantization torchao-int4: torchao has it for GPUs only")


def pretend_missing(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    names = quantization._PACKAGES[method]
    monkeypatch.setitem(quantization._PACKAGES, method, dict.fromkeys(names, lambda: False))
