"""The real model: an answer goes on, id for id, in a new worker or at another replica."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from parley.v1 import chat_pb2, message_pb2
from parley_client import Client, user
from tests.support.requests import ask
from tests.support.served import ServedProcess

_FLAGS = ("--dtype", "float32", "--drain-delay", "0", "--kv-cache-memory", "0.5", "--tool-format", "hermes")
_NUM_TOKENS = 12
_SCHEMA = '{"type": "object", "properties": {"name": {"type": "string"}, "km": {"type": "integer"}}}'
_TOOL = message_pb2.Tool(name="weather", parameters='{"type": "object", "properties": {"city": {"type": "string"}}}')
_REQUIRED = message_pb2.ToolChoice(mode=message_pb2.ToolChoice.MODE_REQUIRED)
_QUESTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Tell me a story about a lighthouse.", {}),
    ("Tell me a story about a lighthouse.", {"do_sample": True, "temperature": 0.9, "seed": 7}),
    ("Name some rivers.", {"do_sample": True, "top_p": 0.9, "frequency_penalty": 0.5, "seed": 8, "logprobs": True}),
    ("Count to a hundred.", {"repetition_penalty": 1.2, "stop_strings": ["never said"]}),
    ("A river as JSON.", {"response_format": {"json_schema": _SCHEMA}, "do_sample": True, "seed": 9, "logprobs": True}),
    ("Paris?", {"tools": [_TOOL], "tool_choice": _REQUIRED, "do_sample": True, "seed": 5, "max_new_tokens": 22}),
)


@pytest.fixture(scope="module", params=["batching", "generate"])
def replica(request: pytest.FixtureRequest) -> Iterator[ServedProcess]:
    with ServedProcess("--engine", request.param, *_FLAGS) as served:
        served.wait_health()
        yield served
        assert served.terminate() == 0


def requests() -> list[chat_pb2.GenerateRequest]:
    defaults = {"max_new_tokens": _NUM_TOKENS, "ignore_eos": True}
    return [ask(text, **{**defaults, **config}) for text, config in _QUESTIONS]


@pytest.mark.timeout(300)
def test_answers_survive_their_worker_unchanged(replica: ServedProcess) -> None:
    expected = [replica.stub.Generate(request, timeout=100).choices[0] for request in requests()]
    streams = [replica.stub.GenerateStream(request, timeout=100) for request in requests()]
    begun = [next(streams[0])]
    begun += [next(streams[0]) for _ in range(5)]
    (worker,) = replica.worker_pids()
    os.kill(worker, signal.SIGKILL)
    answers = [[*begun, *streams[0]], *(list(stream) for stream in streams[1:])]
    for answer, choice in zip(answers, expected, strict=True):
        assert "".join(delta.content for delta in answer) == choice.message.content
        assert [i for delta in answer for i in delta.token_ids] == list(choice.token_ids)
        called = "".join(call.name + call.arguments for delta in answer for call in delta.tool_calls)
        assert called == "".join(call.name + call.arguments for call in choice.message.tool_calls)
        logprobs = [one.logprob for delta in answer for one in delta.logprobs]
        assert logprobs == pytest.approx([one.logprob for one in choice.logprobs], abs=1e-4)
        assert answer[-1].finish_reason == choice.finish_reason
    assert replica.worker_pids() != [worker]


def test_the_clients_streams_go_on_at_another_replica() -> None:
    with ServedProcess(*_FLAGS) as first, ServedProcess(*_FLAGS) as second:
        for replica in (first, second):
            replica.wait_health()
        second.process.send_signal(signal.SIGSTOP)  # so that it is the first that serves
        question = [user("Tell me a story about a lighthouse.")]
        defaults = {"max_new_tokens": 40, "ignore_eos": True}
        greedy, seeded = defaults, {**defaults, "do_sample": True, "temperature": 0.9, "seed": 7}
        with Client(f"ipv4:{first.target},{second.target}") as client:
            expected = [client.chat(question, **options) for options in (greedy, seeded)]
            streams = [client.stream(question, **options) for options in (greedy, seeded)]
            texts = [str(next(stream)) for stream in streams]
            first.process.kill()
            second.process.send_signal(signal.SIGCONT)
            texts = [text + "".join(map(str, stream)) for text, stream in zip(texts, streams, strict=True)]
        assert texts == [reply.content for reply in expected]
        assert [stream.reply.token_ids for stream in streams] == [reply.token_ids for reply in expected]
        assert [stream.reply.usage.completion_tokens for stream in streams] == [40, 40]
