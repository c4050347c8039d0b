"""Engine `batching` on a CUDA device: kernels, CUDA graphs and a step launched ahead change no id and wait for none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from parleyd.config import ModelSettings
from parleyd.engine.batching import BatchingEngine
from parleyd.engine.cuda_graphs import CudaCapture
from parleyd.engine.lean_forward import LeanForward
from parleyd.kernels.cache import PagedKVCache
from parleyd.kernels.paged import NO_KERNELS, Kernels
from parleyd.model.lean_model import LeanModel
from parleyd.worker.build import _graphed, build_engine
from tests.support.tiny_models import (
    CONTEXT,
    FAMILIES,
    LEAN,
    info_of,
    make_engine,
    make_model,
    oracle,
    prompts,
    request,
    run,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """Greedy ids are compared in float32: TensorFloat-32 is not that."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def cuda_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return make_model(family, dtype).to("cuda:0")  # type: ignore[arg-type]


def kernels_of(kind: str) -> Kernels:
    if kind == "gather":
        return NO_KERNELS
    from parleyd.gpu_kernels.triton_decode import triton_decode

    return Kernels(decode=triton_decode(CONTEXT))


@pytest.mark.parametrize("kind", ["gather", "triton"])
@pytest.mark.parametrize(("family", "lean"), [*((f, False) for f in FAMILIES), *((f, True) for f in LEAN)])
def test_greedy_ids_are_those_of_model_generate(family: str, lean: bool, kind: str) -> None:
    some = prompts(16)
    reference = cuda_model(family)
    expected = [oracle(reference, prompt) for prompt in some]
    engine = make_engine(cuda_model(family), lean=lean, kernels=kernels_of(kind), overlap=True)
    together = run(engine, *(request(key, prompt) for key, prompt in enumerate(some)))
    assert [together[key] for key in range(16)] == expected


@pytest.mark.parametrize(("family", "lean"), [("Llama", True), ("Qwen3", True), ("Gemma", False)])
def test_replayed_graphs_give_the_ids_of_model_generate(family: str, lean: bool) -> None:
    some = prompts(13, seed=5)
    reference = cuda_model(family)
    expected = [oracle(reference, prompt) for prompt in some]
    engine = make_engine(
        cuda_model(family), lean=lean, kernels=kernels_of("triton"), capture=CudaCapture(), overlap=True
    )  # fmt: skip
    assert run(engine, request(0, some[0]))[0] == expected[0]
    together = run(engine, *(request(key, prompt) for key, prompt in enumerate(some)))
    assert [together[key] for key in range(13)] == expected


def test_layers_that_wait_for_the_device_are_run_without_graphs(caplog: pytest.LogCaptureFixture) -> None:
    """As those do that look, on the host, which experts have rows."""
    model = cuda_model("Llama")
    cache = PagedKVCache((2, 8, 8, 2, 8), torch.float32, "cuda:0", kernels_of("triton"))
    forward = LeanForward(LeanModel.of(model), cache)

    def waiting(input_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        input_ids.tolist()
        return forward(input_ids, *rest)

    assert _graphed(waiting, cache, 4, 64) is waiting
    assert "no CUDA graphs: RuntimeError" in caplog.text
    assert _graphed(forward, cache, 4, 64) is not forward


def test_draws_and_penalties_are_the_same_with_everything_on_and_off() -> None:
    sampled = {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "repetition_penalty": 1.3, "max_new_tokens": 30}
    some = [request(key, prompt, seed=key, **sampled) for key, prompt in enumerate(prompts(12, seed=2))]
    plain = run(make_engine(cuda_model("Llama"), lean=True), *some)
    graphed: dict[str, Any] = {"kernels": kernels_of("triton"), "capture": CudaCapture(), "overlap": True}
    assert run(make_engine(cuda_model("Llama"), lean=True, **graphed), *some) == plain
    tight = make_engine(cuda_model("Llama"), lean=True, num_blocks=40, context=160, **graphed)
    assert run(tight, *some) == plain
    assert tight.stats().num_preemptions > 0


def test_the_steps_of_a_long_prompt_are_not_launched_all_at_once() -> None:
    engine = make_engine(cuda_model("Llama"), lean=True, overlap=True, max_batch_tokens=16)
    engine.submit(request(1, (5,) * 100, max_new_tokens=1))
    engine._take_inbox()
    for _ in range(3):
        list(engine._run_batch())
    assert len(engine._in_flight) == 1
    assert all(launched.done is not None for _, launched in engine._in_flight)


def test_a_launch_waits_for_nothing() -> None:
    engine = make_engine(
        cuda_model("Llama"), lean=True, kernels=kernels_of("triton"), capture=CudaCapture(), overlap=True, eos=()
    )  # fmt: skip
    kinds: list[dict[str, Any]] = [
        {}, {"do_sample": True, "top_p": 0.9}, {"do_sample": True, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
        {"repetition_penalty": 1.2, "min_new_tokens": 30},
    ]  # fmt: skip
    for key, params in enumerate(kinds):
        engine.submit(request(key, (5 + key,) * 20, max_new_tokens=60, **params))
    seen: set[int] = set()
    while seen != set(range(len(kinds))):
        seen |= {output.key for output in engine.step()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            assert all(output.error is None for output in engine.step())
        engine.submit(request(9, (9,) * 30, max_new_tokens=5))
        for _ in range(5):
            assert all(output.error is None for output in engine.step())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def build(caplog: pytest.LogCaptureFixture, **settings: Any) -> BatchingEngine:
    caplog.set_level("INFO")
    model = cuda_model("Llama", torch.bfloat16)
    name, engine = build_engine(ModelSettings(kv_cache_memory=0.1, **settings), model, info_of(model))
    assert name == "batching" and isinstance(engine, BatchingEngine)
    return engine


def test_the_service_captures_graphs_and_tells_what_they_take(caplog: pytest.LogCaptureFixture) -> None:
    engine = build(caplog)
    assert "CUDA graphs take" in caplog.text and "no CUDA graphs" not in caplog.text
    assert "decoding by triton" in caplog.text
    assert len(run(engine, request(1, (5, 6, 7), max_new_tokens=20, ignore_eos=True))[1]) == 20


def test_all_of_it_can_be_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    engine = build(caplog, cuda_graphs=False, overlap=False, attention="gather")
    assert "CUDA graphs" not in caplog.text
    assert len(run(engine, request(1, (5, 6, 7), max_new_tokens=20, ignore_eos=True))[1]) == 20


def test_memory_does_not_grow_with_the_requests_served(caplog: pytest.LogCaptureFixture) -> None:
    engine = build(caplog)
    some = [request(key, prompt) for key, prompt in enumerate(prompts(40))]
    run(engine, *some)
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        run(engine, *some)
    assert torch.cuda.memory_allocated() <= before + 2**20


def test_the_gpu_benchmark_runs(tmp_path: Path) -> None:
    into = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--new-tokens", "64", "--json", str(into)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=110)
    assert json.loads(into.read_text())["device"] == torch.cuda.get_device_name()
