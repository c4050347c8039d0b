"""The gateway's event loop is never held up: no callback computes for more than 10 ms, whatever is asked for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import struct_pb2

from parley.v1 import chat_pb2, chat_pb2_grpc, generation_pb2, message_pb2
from tests.support.requests import ask
from tests.support.tiny_tokenizer import write_tiny_tokenizer
from tests.support.tools import REQUIRED
from tests.support.watched_gateway import watched_gateway

_LIMIT_MS = 10.0
_ATTEMPTS = 3  # a machine that stalls does so now and then
_NUM_STREAMS = 48
_NUM_WAITING = 500
# Far beyond any context. gRPC's own copying and decoding of the 4 MiB that a message may have takes 10 ms and more.
_LARGE_BYTES = 512 * 1024
# Thousands of messages are in no context but of a template that leaves most out.
_FORGETFUL_TEMPLATE = "{{ '<|im_start|>user\n' + messages[-1]['content'] + '<|im_end|>\n<|im_start|>assistant\n' }}"


@pytest.mark.alone
@pytest.mark.timeout(180)
def test_no_callback_computes_for_more_than_10_ms(tokenizer_folder: Path) -> None:
    assert_never_held_up(tokenizer_folder, load)


@pytest.mark.alone
def test_nor_for_many_small_things_in_one_message(tokenizer_folder: Path) -> None:
    assert_never_held_up(tokenizer_folder, many_small_things)


@pytest.mark.alone
def test_nor_for_many_answers_to_a_long_conversation(tmp_path: Path) -> None:
    folder = write_tiny_tokenizer(tmp_path, chat_template=_FORGETFUL_TEMPLATE)
    assert_never_held_up(folder, a_long_conversation)


@pytest.mark.alone
def test_nor_for_many_answers_to_one_large_grammar(tokenizer_folder: Path) -> None:
    assert_never_held_up(tokenizer_folder, many_answers)


def assert_never_held_up(folder: Path, load: Callable[[str], Coroutine[Any, Any, None]]) -> None:
    seen = []
    for _ in range(_ATTEMPTS):
        with watched_gateway(folder, max_running=_NUM_STREAMS, max_queue=_NUM_WAITING, step_delay_s=0.01) as gateway:
            gateway.reset()
            asyncio.run(load(gateway.target))
            seen.append(gateway.worst())
        if seen[-1][0][0] < _LIMIT_MS:
            return
    pytest.fail(f"held up in each of {_ATTEMPTS} attempts: {seen}")


async def load(target: str) -> None:
    """Streams that run, requests that wait and are cancelled all at once, huge prompts among them."""
    async with grpc.aio.insecure_channel(target, [("grpc.max_send_message_length", -1)]) as channel:
        stub = chat_pb2_grpc.ChatServiceStub(channel)
        running = [stub.GenerateStream(ask("!forever", max_new_tokens=4000)) for _ in range(_NUM_STREAMS)]
        await asyncio.gather(*(call.read() for call in running))
        readers = [asyncio.create_task(read(call)) for call in running]
        waiting = [stub.GenerateStream(ask("x" * 1000)) for _ in range(_NUM_WAITING)]
        for request in large_requests():
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub.Generate(request)
            assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        for call in (*waiting, *running):
            call.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        prompt = chat_pb2.CountTokensRequest(messages=ask("x" * 100_000).messages)
        assert (await stub.CountTokens(prompt)).prompt_tokens > 100_000


async def many_small_things(target: str) -> None:
    """Messages, tools and tool calls in requests of a few KB, and log-probabilities in a whole answer."""
    async with grpc.aio.insecure_channel(target) as channel:
        stub = chat_pb2_grpc.ChatServiceStub(channel)
        calls = message_pb2.Message(tool_calls=[message_pb2.ToolCall(id="x")] * 2500)
        for messages in ([message_pb2.Message()] * 4096, [calls]):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub.Generate(chat_pb2.GenerateRequest(messages=messages))
            assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        deep = '{"not": ' + "[" * 90 + "]" * 90 + "}"
        tools = [message_pb2.Tool(name=f"f{i}", parameters=deep) for i in range(128)]
        for i in range(5):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub.Generate(ask(f"{i}", tools=tools, tool_choice=REQUIRED))
            assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        request = ask("!forever", max_new_tokens=400, num_return_sequences=2, do_sample=True, top_logprobs=20)
        answer = await stub.Generate(request)
        assert [len(choice.logprobs) for choice in answer.choices] == [400] * 2


async def a_long_conversation(target: str) -> None:
    conversation = ask(*["x"] * 4095, num_return_sequences=16, temperature=1, max_new_tokens=4)
    async with grpc.aio.insecure_channel(target) as channel:
        answer = await chat_pb2_grpc.ChatServiceStub(channel).Generate(conversation)
        assert len(answer.choices) == 16


async def many_answers(target: str) -> None:
    """Each takes the grammar to the worker; JSON has three times the letters."""
    choices = [f"{i:04}" + "é" * (_LARGE_BYTES // 2048) for i in range(1024)]
    response_format = generation_pb2.ResponseFormat(choice=generation_pb2.ChoiceFormat(choices=choices))
    async with grpc.aio.insecure_channel(target) as channel:
        request = ask("x", response_format=response_format, num_return_sequences=16, temperature=1, max_new_tokens=4)
        answer = await chat_pb2_grpc.ChatServiceStub(channel).Generate(request)
        assert len(answer.choices) == 16


def large_requests() -> list[chat_pb2.GenerateRequest]:
    """Each is large in another way, and none can be answered."""
    turn = message_pb2.Message(role=message_pb2.ROLE_USER, content="a turn of some words " * 8)
    kwargs = struct_pb2.Struct()
    kwargs["values"] = list(range(10_000))
    properties = {f"p{i}": {"type": "string", "description": "one of many"} for i in range(600)}
    parameters = json.dumps({"properties": properties, "not": {}})
    return [
        ask("word " * (_LARGE_BYTES // 5 - 100)),
        chat_pb2.GenerateRequest(messages=[turn] * (_LARGE_BYTES // 200)),
        chat_pb2.GenerateRequest(messages=[message_pb2.Message(content="x")] * 10_000),
        chat_pb2.GenerateRequest(messages=ask("x" * 5000).messages, chat_template_kwargs=kwargs),
        ask(
            "x",
            tools=[
                message_pb2.Tool(name=f"f{i}", parameters=parameters) for i in range(_LARGE_BYTES // len(parameters))
            ],
            tool_choice=REQUIRED,
        ),
    ]


async def read(call: grpc.aio.UnaryStreamCall[chat_pb2.GenerateRequest, chat_pb2.GenerateStreamResponse]) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass
