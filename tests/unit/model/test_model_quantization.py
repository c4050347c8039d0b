"""`--quantization` and checkpoints that are quantised: what runs here, and one line for what does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from parleyd.config import ModelSettings
from parleyd.engine.build import build_engine
from parleyd.generation import EngineRequest, SamplingParams
from parleyd.model import quantization
from parleyd.model.loader import LoadedModel, load_model
from tests.unit.model.conftest import edit_json, startup_error, write_llama

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


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("method", METHODS)
def test_weights_quantised_at_load_serve_in_engine_batching(method: str, tmp_path: Path) -> None:
    pytest.importorskip(METHODS[method])
    folder = write_llama(tmp_path / "tiny-llama", hidden_size=64, intermediate_size=128)
    settings = ModelSettings(model=str(folder), quantization=method, device_map="cpu")
    loaded = load_model(settings)
    plain = load_model(ModelSettings(model=str(folder))).model
    prompt = list(range(5, 25))
    with torch.inference_mode():
        ours, exact = loaded.model(torch.tensor([prompt])).logits, plain(torch.tensor([prompt])).logits
    assert 0 < (ours - exact).abs().max() < 0.2 * exact.abs().max()  # it is quantised, and still the same model
    config: Any = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0)
    expected = loaded.model.generate(torch.tensor([prompt]), generation_config=config)  # type: ignore[operator]
    assert greedy_ids(loaded, settings, prompt) == expected[0, len(prompt) :].tolist()


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
