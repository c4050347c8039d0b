"""Two steps in flight, and decode steps replayed from fixed buffers: `model.generate`'s own ids all the same."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from parleyd.engine.cuda_graphs import CudaCapture, Replay, graph_sizes
from parleyd.engine.lean_forward import LeanForward
from parleyd.engine.model_runner import Launched, _launched
from parleyd.generation import Output
from parleyd.kernels.cache import PagedKVCache
from parleyd.model.lean_model import LeanModel
from parleyd.sampling.sampler import SampledTokens
from parleyd.worker.build import _graphed
from tests.support import torch_kernels
from tests.support.tiny_models import VOCAB_SIZE, make_engine, make_model, oracle, prompts, request, run


class EagerCapture:
    """Replays by running again, from the same buffers into the same output: CUDA graphs without CUDA."""

    def __init__(self) -> None:
        self.num_replays = 0

    def __call__(self, run: Callable[[], torch.Tensor]) -> Replay:
        output = run().clone()

        def replay() -> torch.Tensor:
            self.num_replays += 1
            return output.copy_(run())

        return replay


@pytest.mark.parametrize("limits", [{}, {"num_blocks": 40}, {"max_batch_tokens": 16}], ids=str)
def test_with_a_step_launched_ahead_ids_are_those_of_model_generate(limits: dict[str, int]) -> None:
    some = prompts(12, seed=1)
    reference = make_model("Llama")
    expected = [oracle(reference, prompt, 40) for prompt in some]
    engine = make_engine(make_model("Llama"), lean=True, overlap=True, **{"context": 160, **limits})
    ids = run(engine, *(request(key, prompt, max_new_tokens=40) for key, prompt in enumerate(some)))
    assert [ids[key] for key in range(12)] == expected
    if "num_blocks" in limits:
        assert engine.stats().num_preemptions > 0
    assert not engine._in_flight


def test_with_a_step_launched_ahead_draws_and_penalties_are_the_same() -> None:
    sampled = {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "repetition_penalty": 1.3, "max_new_tokens": 30}
    some = [request(key, prompt, seed=key, **sampled) for key, prompt in enumerate(prompts(12, seed=2))]
    model = make_model("Llama")
    expected = run(make_engine(model), *some)
    assert run(make_engine(model, overlap=True), *some) == expected
    tight = make_engine(model, overlap=True, num_blocks=40, context=160)
    assert run(tight, *some) == expected
    assert tight.stats().num_preemptions > 0


@pytest.mark.parametrize("family", ["Llama", "Gemma"])
def test_replayed_decode_steps_give_the_ids_of_model_generate(family: str) -> None:
    some = prompts(13, seed=5)
    reference = make_model(family)
    expected = [oracle(reference, prompt) for prompt in some]
    capture = EagerCapture()
    engine = make_engine(
        make_model(family),
        lean=family == "Llama",
        max_running=12,
        kernels=torch_kernels.KERNELS,
        capture=capture,
        overlap=True,
    )
    requests = [request(key, prompt) for key, prompt in enumerate(some)]
    assert run(engine, requests[0])[0] == expected[0]
    together = run(engine, *requests)
    assert [together[key] for key in range(13)] == expected
    assert capture.num_replays > 12


def test_a_random_life_with_a_step_ahead_leaves_the_ledger_whole() -> None:
    chance = random.Random(4)
    engine = make_engine(
        make_model("Llama", num_hidden_layers=1), overlap=True, num_blocks=60, eos=(), context=160,
        kernels=torch_kernels.KERNELS, capture=EagerCapture(),
    )  # fmt: skip
    engine.submit(request(-1, (9,) * 5, max_new_tokens=150))
    for key in range(300):
        engine.submit(request(key, (chance.randrange(4, 90),) * chance.randrange(1, 30), max_new_tokens=50))
        if chance.random() < 0.3:
            engine.step()
        engine.abort(chance.randrange(max(0, key - 10), key + 1))
    for key in range(-1, 300):
        engine.abort(key)
    run(engine, request(5000, (7, 8), max_new_tokens=1))
    engine._scheduler.check_integrity()


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="here they can be captured, or the device is missing")
def test_graphs_that_cannot_be_captured_are_done_without_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    cache = PagedKVCache((2, 8, 8, 2, 8), torch.float32, "cpu", torch_kernels.KERNELS)
    forward = LeanForward(LeanModel.of(make_model("Llama")), cache)
    assert _graphed(forward, cache, 4, 64) is forward
    assert "no CUDA graphs: " in caplog.text


def test_what_waits_for_the_device_is_found_out_before_it_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    mode = ""

    def set_mode(wanted: str) -> None:
        nonlocal mode
        if not mode:  # as torch does, once
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)
        mode = wanted

    def run() -> torch.Tensor:
        if mode == "error":  # as torch does where it would have to wait
            raise RuntimeError("called a synchronizing CUDA operation")
        return torch.zeros(1)

    for name in ("Stream", "current_stream", "stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", MagicMock(side_effect=AssertionError("a capture has begun")))
    with pytest.raises(RuntimeError, match="synchronizing"):
        CudaCapture()(run)
    assert mode == "default"


def test_the_graphs_leave_few_rows_unused() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert graph_sizes(64)[-3:] == [48, 56, 64]


def test_a_step_that_fails_behind_one_in_flight_fails_only_its_own_requests() -> None:
    """The step of request 1 is in flight when that of 2, with 1 beside it, turns out to be impossible."""
    engine = make_engine(make_model("Llama"), overlap=True, eos=())
    engine.submit(request(1, (5,) * 20, max_new_tokens=30))
    outputs: list[Output] = []
    while not outputs:
        outputs += engine.step()
    assert len(engine._in_flight) == 1
    engine.submit(request(2, (VOCAB_SIZE + 5,)))
    engine.submit(request(3, (6,) * 20, max_new_tokens=3))
    done: dict[int, Output] = {}
    num_ids = len(outputs)
    while done.keys() != {1, 2, 3}:
        for output in engine.step():
            num_ids += len(output.token_ids) if output.key == 1 else 0
            if output.is_last:
                done[output.key] = output
    assert all(done[key].error for key in (1, 2, 3))  # one forward pass: they were all in it
    assert num_ids == 2, "what was sampled before the failure is delivered"
    expected = oracle(make_model("Llama"), (7, 8), 5)
    assert run(engine, request(4, (7, 8), max_new_tokens=5))[4][: len(expected)] == expected
    engine._scheduler.check_integrity()


@pytest.mark.parametrize("when", ["launch", "wait"])
def test_a_broken_device_ends_the_engine_with_a_step_in_flight(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    engine = make_engine(make_model("Llama"), overlap=True, eos=())
    engine.submit(request(1, (5,) * 20, max_new_tokens=30))
    engine.step()
    assert len(engine._in_flight) == 1

    def broken(*_: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(*((engine._runner, "launch") if when == "launch" else (Launched, "wait")), broken)
    with pytest.raises(torch.AcceleratorError):
        engine.step()


def test_on_cuda_a_step_that_samples_nothing_is_waited_for_too(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Event:
        def record(self) -> None:
            calls.append("record")

        def synchronize(self) -> None:
            calls.append("synchronize")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    nothing = SampledTokens(torch.empty(0), torch.empty(0), None)
    launched = _launched(nothing, torch.device("cuda"))
    assert launched.wait() == ([], {})
    assert calls == ["record", "synchronize"]
