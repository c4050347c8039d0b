"""Engine `batching` on an emulated CUDA device: it waits for nothing, mixes no devices, and gives the CPU's own ids."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import Tensor

from parleyd.config import ModelSettings
from parleyd.kernels import choice
from parleyd.kernels.paged import Kernels
from parleyd.model.upload import upload
from parleyd.sampling.sampler import sample
from parleyd.sampling.sampling_row import SamplingRow
from parleyd.worker.build import build_engine
from tests.support.emulated_cuda import emulated_cuda
from tests.support.tiny_models import info_of, make_engine, make_model, oracle, prompts, request, run

PROMPTS = prompts(6)
PARAMS: list[dict[str, Any]] = [
    {}, {"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.2}, {"do_sample": True, "top_k": 9, "min_p": 0.1},
    {"presence_penalty": 0.5, "min_new_tokens": 8, "logit_bias": ((7, 2.0),)}, {"logprobs": True}, {},
]  # fmt: skip
REQUESTS = [request(key, prompt, **params) for key, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True))]
CUDA = torch.device("cuda:0")


def decode(query: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """A DecodeKernel that waits for nothing."""
    key, value = (one[table].transpose(1, 2).flatten(2, 3) for one in (keys, values))
    scores = query.view(len(query), key.shape[1], -1, key.shape[3]) @ key.transpose(2, 3) * scale
    is_beyond = torch.arange(key.shape[2], device=query.device) >= lengths[:, None]
    return (scores.masked_fill(is_beyond[:, None, None], -torch.inf).softmax(-1) @ value).view(query.shape)


def test_what_cuda_refuses_and_what_waits_for_it_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with emulated_cuda(monkeypatch):
        x = torch.arange(4.0, device=CUDA)
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(4)
        with pytest.warns(UserWarning, match="prototype"):
            torch.cuda.set_sync_debug_mode("error")
        waiting: list[Callable[[], Any]] = [
            x.tolist, x.cpu, x.max().item, lambda: bool(x[0] > 1), lambda: x[x > 1], lambda: x[[0, 2]],
            lambda: torch.ones(4).to(CUDA, non_blocking=True), lambda: torch.tensor([1], device=CUDA),
        ]  # fmt: skip
        for wait in waiting:
            with pytest.raises(RuntimeError, match="synchronizing"):
                wait()
        on_host = (upload(np.arange(4.0), CUDA) + 1).to("cpu", non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        assert on_host.tolist() != [1, 2, 3, 4]
        done.synchronize()
        assert on_host.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("limits", [{}, {"num_blocks": 20, "context": 160}, {"max_batch_tokens": 16}], ids=str)
@pytest.mark.parametrize(("family", "lean"), [("Llama", True), ("Qwen3", True), ("Gemma", False)])
def test_steps_wait_for_nothing_and_give_the_ids_of_a_cpu(
    family: str, lean: bool, limits: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(make_engine(make_model(family)), *REQUESTS)
    assert expected[0] == oracle(make_model(family), PROMPTS[0])
    with emulated_cuda(monkeypatch) as device:
        engine = make_engine(make_model(family).to(CUDA), lean=lean, overlap=True, **limits)  # type: ignore[arg-type]
        device.raises = True
        engine.submit(request(9, PROMPTS[0], max_new_tokens=90))
        engine.step()
        engine.abort(9)
        assert run(engine, *REQUESTS) == expected
    assert engine.stats().num_preemptions > 0 or "num_blocks" not in limits


@pytest.mark.parametrize("family", ["Llama", "Gemma"])
def test_the_service_captures_graphs_that_give_the_ids_of_a_cpu(
    family: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(choice, "_triton", lambda shape: Kernels(decode))
    expected = run(make_engine(make_model(family)), *REQUESTS)
    with emulated_cuda(monkeypatch):
        model = make_model(family).to(CUDA)  # type: ignore[arg-type]
        _, engine = build_engine(ModelSettings(max_running=6), model, info_of(model))
        torch.cuda.set_sync_debug_mode("error")
        assert run(engine, *REQUESTS) == expected
        made: Any = torch.cuda.Stream
        assert made.call_count == 1, "on each, cuBLAS keeps memory of its own"
    assert "decoding by triton" in caplog.text and "CUDA graphs take 0.00 GiB" in caplog.text


def test_grammars_and_logits_that_are_not_finite_wait_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.random.default_rng(0).standard_normal((3, 1000), np.float32)
    logits[1, 7] = math.nan
    grammar = MagicMock(fill=lambda mask, index: mask.put(0, 1 << 5))
    rows = [SamplingRow(one.params, array("i", [6] * 10), 10, 0) for one in REQUESTS[:3]]
    with emulated_cuda(monkeypatch) as device:
        device.raises = True
        last_ids = upload(np.full(3, 6), CUDA)
        sampled = sample(upload(logits, CUDA), [rows[0]._replace(grammar=grammar), *rows[1:]], last_ids, (3,))
        device.raises = False
        assert sampled.token_ids.tolist()[0] == 5
        assert sampled.are_finite.tolist() == [True, False, True]
