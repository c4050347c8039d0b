"""Nothing that a request may ask for makes the service run out of memory: extremes of every range, all at once."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parley.v1 import chat_pb2
from tests.support.requests import ask
from tests.support.served import ServedProcess

_CONTEXT_TOKENS = 8192
_VOCAB_SIZE = 49152
# Room for the keys and values of a context and a third.
_KV_CACHE_GIB = 0.25
# Weights, torch, the KV cache and one step's activations; a request may add nothing to that.
_PEAK_GIB = 2.0


@pytest.fixture(scope="module")
def small() -> Iterator[ServedProcess]:
    """A server with little memory for keys and values."""
    with ServedProcess("--kv-cache-memory", str(_KV_CACHE_GIB), "--drain-delay", "0") as process:
        process.wait_health()
        yield process
        assert process.terminate() == 0


def peak_gib(process: ServedProcess) -> float:
    """The most main memory that any worker had so far."""
    peaks = []
    for pid in process.worker_pids():
        status = Path(f"/proc/{pid}/status").read_text()
        peaks.append(next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")))
    return max(peaks) / 2**20


ids = st.integers(0, _VOCAB_SIZE - 1)
edge = st.sampled_from


configs = st.fixed_dictionaries(
    {"max_new_tokens": edge([1, 3, 8]), "ignore_eos": st.booleans()},
    optional={
        "do_sample": st.just(True),
        "temperature": edge([0.0, 1e-30, 1.0, 10.0]),
        "top_p": edge([1e-30, 0.5, 1.0]),
        "top_k": edge([0, 1, _VOCAB_SIZE, 2**31 - 1]),
        "min_p": edge([0.0, 1.0]),
        "repetition_penalty": edge([1e-30, 1.0, 10.0]),
        "presence_penalty": edge([-2.0, 2.0]),
        "frequency_penalty": edge([-2.0, 2.0]),
        "seed": edge([0, 2**64 - 1]),
        "stop_strings": st.lists(st.text(min_size=1, max_size=256), min_size=16, max_size=16),
        "stop_token_ids": st.lists(ids, min_size=64, max_size=64),
        "logit_bias": st.integers(0, 1000).map(
            lambda seed: dict.fromkeys(random.Random(seed).sample(range(_VOCAB_SIZE), 1024), 100.0)
        ),
        "logprobs": st.just(True),
        "top_logprobs": edge([0, 20]),
    },
)


@pytest.mark.timeout(300)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.lists(configs, min_size=4, max_size=4), num_choices=edge([1, 16]))
def test_extreme_parameters_take_no_memory_to_speak_of(
    small: ServedProcess, batch: list[dict[str, object]], num_choices: int
) -> None:
    requests = [ask(f"question {i}", **config) for i, config in enumerate(batch)]
    for request in requests:
        config = request.generation_config
        if config.do_sample and config.temperature:
            config.num_return_sequences = num_choices
    answers = list(small.stub.GenerateBatch(chat_pb2.GenerateBatchRequest(requests=requests), timeout=120))
    assert [answer.error for answer in answers if answer.HasField("error")] == []
    assert peak_gib(small) < _PEAK_GIB


@pytest.mark.timeout(300)
def test_long_prompts_with_the_longest_answers_take_no_memory_to_speak_of(small: ServedProcess) -> None:
    """Together they may grow to twice what there is room for. A quarter of the context each is long enough: to read a
    whole one takes a minute on a busy machine."""
    options = {"max_new_tokens": _CONTEXT_TOKENS, "ignore_eos": True, "do_sample": True, "top_logprobs": 20}
    prompts = [f"{word} " * (_CONTEXT_TOKENS // 4) for word in ("river", "stone")]
    calls = [small.stub.GenerateStream(ask(prompt, **options), timeout=200) for prompt in prompts]
    assert all(len(next(call).token_ids) == len(next(call).logprobs) > 0 for call in calls)
    for call in calls:
        call.cancel()
    assert peak_gib(small) < _PEAK_GIB


@pytest.mark.timeout(300)
def test_the_service_serves_on_after_it_all(small: ServedProcess) -> None:
    assert small.stub.Generate(ask("still there?", max_new_tokens=2), timeout=60).usage.completion_tokens
    with pytest.raises(grpc.RpcError) as error:
        small.stub.Generate(ask("word " * _CONTEXT_TOKENS), timeout=60)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
