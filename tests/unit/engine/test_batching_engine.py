"""Engine `batching` on tiny random models of each family: `model.generate`'s own ids, whatever else is in the batch."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch

from parleyd.engine import lean_forward, stock_forward
from parleyd.engine.batching import BatchingEngine, BrokenStateError
from parleyd.engine.cuda_graphs import Capture
from parleyd.engine.stock_forward import StockForward, checked_stock_forward
from parleyd.generation import FinishReason
from parleyd.kernels.cache import PagedKVCache
from parleyd.kernels.paged import NO_KERNELS
from parleyd.scheduling.kv_cache import IntegrityError
from tests.support import torch_kernels
from tests.support.tiny_models import (
    BLOCK_SIZE,
    CONTEXT,
    FAMILIES,
    LEAN,
    VOCAB_SIZE,
    make_engine,
    make_model,
    oracle,
    prompts,
    request,
    run,
)

EACH_FORWARD = [*((family, False) for family in FAMILIES), *((family, True) for family in LEAN)]
# Little of everything: chunks, and preemption in every family.
TIGHT = {"num_blocks": 22, "max_batch_tokens": 24, "max_mixed_prefill_tokens": 5}


@pytest.mark.parametrize(("family", "lean"), EACH_FORWARD)
def test_greedy_ids_are_those_of_model_generate_alone_and_among_neighbours(family: str, lean: bool) -> None:
    some = prompts(16)
    reference = make_model(family)
    expected = [oracle(reference, prompt) for prompt in some]
    requests = [request(key, prompt) for key, prompt in enumerate(some)]
    engine = make_engine(make_model(family), lean=lean)
    for one in requests[:3]:
        assert run(engine, one)[one.key] == expected[one.key]
    engine = make_engine(make_model(family), lean=lean)
    together = run(engine, *requests)
    assert [together[key] for key in range(16)] == expected
    assert run(engine, *requests) == together  # prefix hits this time
    assert engine.stats().num_cached_prompt_tokens > 0


@pytest.mark.parametrize(
    ("family", "lean", "limits"),
    [
        *(
            ("Llama", lean, limits)
            for limits in (
                {"max_batch_tokens": 16},
                {"max_mixed_prefill_tokens": 3},
                {"num_blocks": 40},
                {"max_running": 2},
            )
            for lean in (False, True)
        ),
        *((family, lean, TIGHT) for family, lean in EACH_FORWARD),
    ],
    ids=str,
)
def test_chunks_and_preemption_change_no_id(family: str, lean: bool, limits: dict[str, int]) -> None:
    some = prompts(12, seed=1)
    reference = make_model(family)
    expected = [oracle(reference, prompt, 40) for prompt in some]
    engine = make_engine(make_model(family), lean=lean, **{"context": 160, **limits})
    ids = run(engine, *(request(key, prompt, max_new_tokens=40) for key, prompt in enumerate(some)))
    assert [ids[key] for key in range(12)] == expected
    if "num_blocks" in limits:
        assert engine.stats().num_preemptions > 0


def test_a_block_that_is_copied_may_be_begun_anew_in_the_same_step() -> None:
    """The one in which a prompt ends, where nothing else is left for what follows that prompt."""
    prompt = tuple(range(10, 10 + BLOCK_SIZE + 4))
    expected = oracle(make_model("Llama"), prompt, 11)
    engine = make_engine(make_model("Llama"), lean=True, context=3 * BLOCK_SIZE, num_blocks=3)
    run(engine, request(1, prompt, max_new_tokens=1))
    resumed = replace(request(2, prompt, max_new_tokens=11), output_ids=tuple(expected[:7]))
    assert run(engine, resumed)[2] == expected[7:]
    assert engine.stats().num_cached_prompt_tokens == len(prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_draw_depends_on_neither_neighbours_nor_preemption(family: str) -> None:
    sampled = {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "repetition_penalty": 1.1, "max_new_tokens": 30}
    some = [request(key, prompt, seed=key, **sampled) for key, prompt in enumerate(prompts(12, seed=2))]

    def engine(**limits: Any) -> BatchingEngine:
        return make_engine(make_model(family), lean=family in LEAN, context=160, **limits)

    alone = {one.key: run(engine(), one)[one.key] for one in some}
    assert run(engine(), *some) == alone
    tight = engine(**TIGHT)
    assert run(tight, *some) == alone
    assert tight.stats().num_preemptions > 0


@pytest.mark.parametrize(("family", "lean"), EACH_FORWARD)
def test_in_bfloat16_the_next_token_is_the_models_own_but_for_near_ties(family: str, lean: bool) -> None:
    ids = prompts(1, seed=3)[0] + tuple(range(10, 60))
    with torch.no_grad():
        logits = make_model(family, torch.bfloat16)(input_ids=torch.tensor([ids])).logits[0].float()
    engine = make_engine(make_model(family, torch.bfloat16), lean=lean)
    two_best = logits.topk(2).values
    clear = (two_best[:, 0] - two_best[:, 1] > 0.05 * logits.abs().max()).nonzero().flatten().tolist()
    assert len(clear) > len(ids) // 4
    for place in clear:
        (chosen,) = run(engine, request(1, ids[: place + 1], max_new_tokens=1, ignore_eos=True))[1]
        assert chosen == int(logits[place].argmax())


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("capture", [None, lambda run: run])
def test_a_step_makes_progress_at_each_layer(
    monkeypatch: pytest.MonkeyPatch, lean: bool, capture: Capture | None
) -> None:
    """That of a long prompt may take longer than a worker may do nothing."""
    kernels = torch_kernels.KERNELS if capture else NO_KERNELS
    engine = make_engine(make_model("Llama", num_hidden_layers=5), lean=lean, capture=capture, kernels=kernels)
    seen: list[int] = []
    owner, name = (lean_forward, "attend_to_written") if lean else (stock_forward, "attend")
    attend: Callable[..., torch.Tensor] = getattr(owner, name)

    def watched(*arguments: Any) -> torch.Tensor:
        seen.append(engine.progress)
        return attend(*arguments)

    monkeypatch.setattr(owner, name, watched)
    before = engine.progress
    engine.submit(request(1, (5,) * 50, max_new_tokens=1))
    assert engine.progress == before, "a request is no progress"
    engine.step()
    assert len(set(seen)) == len(seen) == 5


def test_progress_tells_also_of_a_request_that_was_aborted_before_it_began() -> None:
    engine = make_engine(make_model("Llama"))
    progress = engine.progress
    engine.submit(request(1, (5, 6)))
    engine.abort(1)
    engine.submit(request(2, (5,) * CONTEXT))  # ends at once
    engine.step()
    assert engine.progress > progress


def test_an_abort_frees_its_blocks_before_the_next_output() -> None:
    engine = make_engine(make_model("Llama"), eos=())
    engine.submit(request(1, (5,) * 50, max_new_tokens=100))
    engine.submit(request(2, (6,) * 50, max_new_tokens=100))
    seen: set[int] = set()
    while seen != {1, 2}:
        seen |= {output.key for output in engine.step()}
    engine.abort(1)
    assert engine.stats().num_used_blocks == 14
    assert {output.key for output in engine.step()} == {2}
    assert engine.stats().num_running == 1 and engine.stats().num_used_blocks == 7


def test_a_thousand_random_cancels_leave_the_ledger_whole() -> None:
    chance = random.Random(4)
    engine = make_engine(make_model("Llama", num_hidden_layers=1), num_blocks=60, eos=(), context=160)
    engine.submit(request(-1, (9,) * 5, max_new_tokens=150))
    for key in range(1000):
        engine.submit(request(key, (chance.randrange(4, 90),) * chance.randrange(1, 30), max_new_tokens=50))
        if chance.random() < 0.3:
            engine.step()
        engine.abort(chance.randrange(max(0, key - 10), key + 1))
    for key in range(-1, 1000):
        engine.abort(key)
    run(engine, request(5000, (7, 8), max_new_tokens=1))
    engine._scheduler.check_integrity()


def test_books_that_do_not_add_up_end_the_engine_before_it_waits_for_more() -> None:
    engine = make_engine(make_model("Llama"))
    run(engine, request(1, (5, 6)))
    engine._scheduler._ledger._ref_counts[0] += 1
    # Without a look at the books it would wait for this one, and answer it.
    waiter = threading.Timer(1, engine.submit, [request(2, ())])
    waiter.start()
    try:
        with pytest.raises(IntegrityError, match="block 0 is held 0 times but counted 1"):
            engine.step()
    finally:
        waiter.cancel()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("lean", [False, True])
def test_a_step_that_fails_fails_only_its_requests(lean: bool, overlap: bool) -> None:
    some = prompts(4, seed=4, longest=40)
    expected = [oracle(make_model("Llama"), prompt) for prompt in some]
    engine = make_engine(make_model("Llama"), lean=lean, overlap=overlap)
    for key in (0, 1):
        engine.submit(request(key, some[key], max_new_tokens=100, ignore_eos=True))
    decoding: set[int] = set()
    while decoding != {0, 1}:
        decoding |= {output.key for output in engine.step()}
    engine.submit(request(2, some[2]))
    engine.submit(request(3, (VOCAB_SIZE + 5,)))
    failed: set[int] = set()
    while 3 not in failed:
        failed |= {output.key for output in engine.step() if output.error}
    assert failed == {0, 1, 2, 3}
    # Nothing of what the step did not write is taken for cached.
    joined = run(engine, *(request(10 + key, prompt) for key, prompt in enumerate(some)))
    assert [joined[10 + key] for key in range(4)] == expected


@pytest.mark.parametrize("overlap", [False, True])
def test_steps_that_fail_one_after_the_other_end_the_engine(monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    engine = make_engine(make_model("Llama"), overlap=overlap)

    def broken(*_: Any) -> Any:
        raise RuntimeError("the weights are gone")

    def fail(key: int) -> None:
        engine.submit(request(key, (5, 6)))
        (output,) = engine.step()
        assert output.key == key and output.error == "RuntimeError: the weights are gone"

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "launch", broken)
        fail(1)
        fail(2)
    assert run(engine, request(3, (5, 6)))[3], "a step that succeeds makes the failures before it those of requests"
    monkeypatch.setattr(engine._runner, "launch", broken)
    for key in (4, 5, 6):
        fail(key)
    with pytest.raises(BrokenStateError, match="3 steps"):
        engine.step()


def test_the_last_output_tells_why_and_what_was_cached() -> None:
    engine = make_engine(make_model("Llama"), eos=())
    prompt = tuple(range(10, 10 + 3 * BLOCK_SIZE + 1))
    run(engine, request(1, prompt, max_new_tokens=1))
    engine.submit(request(2, prompt, max_new_tokens=2))
    outputs = [*engine.step(), *engine.step()]
    assert [output.finish_reason for output in outputs] == [None, FinishReason.LENGTH]
    assert outputs[0].cached_prompt_tokens == 3 * BLOCK_SIZE


def test_layers_that_compute_something_else_with_our_attention_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("Gemma")
    attend = StockForward._attend

    def wrong(self: StockForward, module: Any, query: Any, key: Any, *rest: Any, **more: Any) -> Any:
        return attend(self, module, query, key * 3, *rest, **more)

    monkeypatch.setattr(StockForward, "_attend", wrong)
    cache = PagedKVCache((2, 8, 32, 2, 16), torch.float32, "cpu")
    held = weakref.ref(cache)
    before = model.config._attn_implementation
    assert checked_stock_forward(model, cache) is None
    assert model.config._attn_implementation == before
    del cache
    gc.collect()
    assert held() is None, "on a GPU that would be most of its memory"


def test_a_device_that_breaks_in_the_check_is_no_reason_for_another_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(StockForward, "_attend", broken)
    with pytest.raises(torch.AcceleratorError):
        checked_stock_forward(make_model("Gemma"), PagedKVCache((2, 8, 32, 2, 16), torch.float32, "cpu"))


def test_a_kv_cache_takes_memory_only_where_it_is_written() -> None:
    before = psutil.Process().memory_info().rss
    cache = PagedKVCache((1, 2**14, 32, 4, 64), torch.bfloat16, "cpu")  # 512 MiB
    assert not cache.keys[0, 5].any() and not cache.values[0, -1].any()
    assert psutil.Process().memory_info().rss - before < 64 * 2**20
