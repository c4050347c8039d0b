"""What the clients send and how they hand over what comes back."""

from __future__ import annotations

import asyncio
import math
import threading

import grpc
import pytest
from google.protobuf import json_format
from grpc_health.v1 import health_pb2

from parley.v1 import chat_pb2, generation_pb2, message_pb2
from parley_client import (
    AsyncClient,
    ConnectionFailed,
    DeadlineExceeded,
    FinishReason,
    HealthStatus,
    InvalidRequest,
    Timings,
    ToolCall,
    Usage,
    user,
)

QUESTION = [user("Give me a short introduction to large language models.")]


def test_chatting_takes_four_lines(connect, server):
    server.says("They ", "predict ", "words.")
    with connect(server.target) as client:
        reply = client.chat(QUESTION, max_new_tokens=512)
        assert reply.content == "They predict words."


def test_a_reply_tells_all_that_the_answer_tells(client, server):
    server.says("Hello", " there")
    reply = client.chat(QUESTION)
    assert str(reply) == reply.content == "Hello there"
    assert reply.token_ids == [0, 1]
    assert reply.finish_reason is FinishReason.STOP
    assert (reply.request_id, reply.model, reply.seed) == ("request-1", "scripted", 2**63)
    assert reply.usage == Usage(prompt_tokens=7, completion_tokens=2, cached_prompt_tokens=2)
    assert reply.timings == Timings(queue_s=0.001, time_to_first_token_s=0.02, total_s=1.0)
    assert isinstance(reply.proto, chat_pb2.GenerateResponse)


def test_a_stream_gives_pieces_and_then_the_reply_of_the_unary_call(client, server):
    server.says("Hello", " ", "there")
    stream = client.stream(QUESTION)
    pieces = list(stream)
    assert [str(piece) for piece in pieces] == ["Hello", " ", "there"]
    assert [piece.token_ids for piece in pieces] == [[0], [1], [2]]
    assert [piece.finish_reason for piece in pieces] == [None, None, FinishReason.STOP]
    assert pieces[-1].usage.completion_tokens == 3
    assert isinstance(pieces[0].proto, chat_pb2.GenerateStreamResponse)
    assert stream.reply.proto == client.chat(QUESTION).proto


def test_the_reply_grows_while_the_stream_runs(client, server):
    server.says("Hello", " there")
    stream = client.stream(QUESTION)
    next(stream)
    assert (stream.reply.content, stream.reply.finish_reason) == ("Hello", None)
    next(stream)
    assert (stream.reply.content, stream.reply.finish_reason) == ("Hello there", FinishReason.STOP)


def test_a_reply_goes_on_as_a_message(client, server):
    server.says("Hi.")
    messages = list(QUESTION)
    messages.append(client.chat(messages))
    messages.append(user("And now?"))
    client.chat(messages)
    sent = server.requests[-1].messages
    assert [(message.role, message.content) for message in sent[1:]] == [
        (message_pb2.ROLE_ASSISTANT, "Hi."),
        (message_pb2.ROLE_USER, "And now?"),
    ]


@pytest.mark.parametrize("method", ["chat", "stream"])
def test_every_option_reaches_the_server(client, server, method):
    server.says("x")
    answer = getattr(client, method)(
        QUESTION,
        max_new_tokens=5,
        temperature=0.5,
        seed=2**64 - 1,
        stop_strings=["\n"],
        logit_bias={7: -1.5},
        model="scripted",
        tools=[{"name": "weather", "parameters": {"type": "object"}}],
        tool_choice="weather",
        response_format={"regex": "[a-z]+"},
        chat_template_kwargs={"enable_thinking": False},
        continue_final_message=True,
        request_id="mine",
        priority=-3,
    )
    list(answer if method == "stream" else ())
    assert json_format.MessageToDict(server.requests[-1], preserving_proto_field_name=True) == {
        "model": "scripted",
        "messages": [{"role": "ROLE_USER", "content": QUESTION[0].content}],
        "generation_config": {
            "max_new_tokens": 5,
            "temperature": 0.5,
            "seed": str(2**64 - 1),
            "stop_strings": ["\n"],
            "logit_bias": {"7": -1.5},
        },
        "tools": [{"name": "weather", "parameters": '{"type": "object"}'}],
        "tool_choice": {"name": "weather"},
        "response_format": {"regex": "[a-z]+"},
        "chat_template_kwargs": {"enable_thinking": False},
        "continue_final_message": True,
        "request_id": "mine",
        "priority": -3,
    }


def test_metadata_goes_with_each_call(connect, server):
    server.says("x")
    with connect(server.target, metadata={"Authorization": "Bearer secret"}) as client:
        client.chat(QUESTION)
        assert server.metadata["authorization"] == "Bearer secret"


def test_no_proxy_stands_between_a_client_and_its_own_machine(connect, server, monkeypatch):
    for name in ("grpc_proxy", "https_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    server.says("Hello")
    with connect(server.target, timeout=20) as client:
        assert client.chat(QUESTION).content == "Hello"
    with (
        connect("parley.invalid:50051", timeout=20) as client,
        pytest.raises(ConnectionFailed, match=r"127\.0\.0\.1:1: Failed to connect"),
    ):
        client.chat(QUESTION)


def test_streamed_choices_and_tool_calls_are_put_together(client, server):
    def deltas(request, context):
        call = message_pb2.ToolCallDelta
        stop, tool_calls = generation_pb2.FINISH_REASON_STOP, generation_pb2.FINISH_REASON_TOOL_CALLS
        yield chat_pb2.GenerateStreamResponse(index=1, content="b", token_ids=[2], request_id="r", model="m", seed=4)
        yield chat_pb2.GenerateStreamResponse(tool_calls=[call(id="call-0", name="weather", arguments='{"city": ')])
        yield chat_pb2.GenerateStreamResponse(index=1, token_ids=[3], finish_reason=stop, stop_string="c")
        yield chat_pb2.GenerateStreamResponse(tool_calls=[call(arguments='"Bern"}')], reasoning_content="hm")
        yield chat_pb2.GenerateStreamResponse(finish_reason=tool_calls, usage=chat_pb2.Usage(completion_tokens=4))

    server.script["GenerateStream"] = deltas
    stream = client.stream(QUESTION, num_return_sequences=2)
    for _ in stream:
        pass
    first, second = stream.reply.choices
    assert first.tool_calls == (ToolCall("call-0", "weather", '{"city": "Bern"}'),)
    assert (first.reasoning_content, first.finish_reason) == ("hm", FinishReason.TOOL_CALLS)
    assert (second.index, second.content, second.token_ids, second.stop_string) == (1, "b", [2, 3], "c")
    assert stream.reply.message.tool_calls == first.tool_calls


def test_answers_beyond_four_mebibytes_are_received(client, server):
    server.says("x" * (5 << 20))
    assert len(client.chat(QUESTION).content) == 5 << 20


def test_text_that_cannot_be_encoded_is_refused_before_anything_is_sent(client, server):
    for method in (client.chat, client.stream, client.count_tokens):
        with pytest.raises(InvalidRequest) as caught:
            method([user("fine"), user("not \ud800")])
        assert [violation.field for violation in caught.value.violations] == ["messages[1].content"]
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert server.requests == []


@pytest.mark.parametrize("method", ["chat", "stream"])
def test_an_unknown_option_is_a_type_error_that_names_it(client, method):
    with pytest.raises(TypeError, match=rf"{method}\(\) got an unexpected keyword argument 'max_tokens'"):
        getattr(client, method)(QUESTION, max_tokens=5)


def test_count_tokens_counts_the_prompt(client, server):
    server.script["CountTokens"] = lambda request, context: chat_pb2.CountTokensResponse(prompt_tokens=42)
    assert client.count_tokens(QUESTION, chat_template_kwargs={"x": 1}) == 42
    assert server.requests[-1].chat_template_kwargs["x"] == 1


def test_model_info_tells_what_is_served(client, server):
    defaults = generation_pb2.GenerationConfig(temperature=0.5, stop_strings=["\n"], logit_bias={3: 1.0})
    served = chat_pb2.GetModelResponse(
        model="scripted",
        max_context_tokens=99,
        vocab_size=100,
        default_generation_config=defaults,
        capabilities=["chat", "stream"],
        engine="none",
        dtype="bfloat16",
        device="cpu",
    )
    server.script["GetModel"] = lambda request, context: served
    info = client.model_info()
    assert (info.model, info.max_context_tokens, info.vocab_size) == ("scripted", 99, 100)
    assert (info.engine, info.dtype, info.device) == ("none", "bfloat16", "cpu")
    assert info.capabilities == ["chat", "stream"]
    assert info.default_generation_config == {"temperature": 0.5, "stop_strings": ["\n"], "logit_bias": {3: 1.0}}
    assert info.proto == served


@pytest.mark.parametrize("status", list(HealthStatus))
def test_health_tells_the_servers_state(client, server, status):
    server.is_serving(health_pb2.HealthCheckResponse.ServingStatus.Value(status))
    assert client.health() is status


def test_a_state_that_this_version_does_not_know_is_unknown(client, server):
    server.is_serving(99)
    assert client.health() is HealthStatus.UNKNOWN


def test_waiting_for_readiness_outlasts_restarts_and_loading(client, server):
    watches = []

    def watch(request, context):
        watches.append(request)
        if len(watches) == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
        yield health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)
        if len(watches) == 3:
            yield health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
            server.hold(context)

    server.script["Watch"] = watch
    client.wait_until_ready(timeout=20)
    assert len(watches) == 3
    assert server.has_seen_the_end(num_calls=3)


@pytest.mark.parametrize("timeout", [None, 20])
@pytest.mark.parametrize(
    ("code", "details"),
    [(grpc.StatusCode.DEADLINE_EXCEEDED, "stream timeout"), (grpc.StatusCode.INTERNAL, "RST_STREAM with error code 2")],
    ids=["long", "lost"],
)
def test_waiting_for_readiness_outlasts_proxies_that_end_watches(client, server, code, details, timeout):
    watches = []

    def watch(request, context):
        watches.append(request)
        if len(watches) == 1:
            yield health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)
            context.abort(code, details)
        yield health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    server.script["Watch"] = watch
    client.wait_until_ready(timeout=timeout)
    assert len(watches) == 2


def test_waiting_for_readiness_ends_with_its_timeout(client, server):
    def watch(request, context):
        yield health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)
        server.hold(context)

    server.script["Watch"] = watch
    with pytest.raises(DeadlineExceeded, match=r"not ready within 0\.3 s: the server is NOT_SERVING"):
        client.wait_until_ready(timeout=0.3)


@pytest.mark.parametrize("method", ["chat", "stream"])
@pytest.mark.parametrize("whose", ["call", "client"])
def test_timeouts_are_the_deadline_of_the_call(connect, server, method, whose):
    deadlines = []

    def hold(request, context):
        deadlines.append(context.time_remaining())
        server.hold(context)

    server.script["Generate"] = hold
    server.script["GenerateStream"] = lambda request, context: iter(hold(request, context) or ())
    with connect(server.target, timeout=30 if whose == "call" else 0.3) as client:
        with pytest.raises(DeadlineExceeded):
            list(getattr(client, method)(QUESTION, timeout=0.3 if whose == "call" else None))
        assert server.has_seen_the_end()
    assert deadlines[0] < 1


@pytest.mark.parametrize("endless", [math.inf, 1e10, 1e300])
def test_an_endless_timeout_is_none(connect, server, endless):
    server.says("Hello")
    server.script["Watch"] = lambda request, context: iter([health_pb2.HealthCheckResponse(status=1)])
    with connect(server.target, timeout=1e-6) as client:
        client.wait_until_ready(timeout=endless)
        assert str(client.chat(QUESTION, timeout=endless)) == "Hello"
        assert "".join(map(str, client.stream(QUESTION, timeout=endless))) == "Hello"


def test_a_timeout_that_is_no_number_is_refused_by_every_call(connect):
    with pytest.raises(ValueError, match="timeout must be a number of seconds, not nan"):
        connect("localhost:1", timeout=math.nan)
    with connect("localhost:1") as client:
        for method in "chat", "stream", "count_tokens", "generate_batch", "model_info", "health", "wait_until_ready":
            arguments = [] if method in ("model_info", "health", "wait_until_ready") else [[]]
            with pytest.raises(ValueError, match="timeout must be a number of seconds, not nan"):
                getattr(client, method)(*arguments, timeout=math.nan)


def test_credentials_secure_the_channel(connect):
    # Local credentials need no certificates, and a plain-text client could not talk to them.
    from concurrent import futures

    from parley.v1 import chat_pb2_grpc

    class Service(chat_pb2_grpc.ChatServiceServicer):
        def CountTokens(self, request, context):
            assert context.auth_context()
            return chat_pb2.CountTokensResponse(prompt_tokens=1)

    with futures.ThreadPoolExecutor() as pool:
        grpc_server = grpc.server(pool)
        chat_pb2_grpc.add_ChatServiceServicer_to_server(Service(), grpc_server)
        port = grpc_server.add_secure_port("127.0.0.1:0", grpc.local_server_credentials())
        grpc_server.start()
        with connect(f"127.0.0.1:{port}", credentials=grpc.local_channel_credentials()) as client:
            assert client.count_tokens(QUESTION) == 1
        grpc_server.stop(None).wait()


def test_an_asyncio_client_that_would_belong_to_no_running_loop_is_not_made(server):
    with pytest.raises(RuntimeError, match="no running event loop"):
        AsyncClient(server.target)


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.chat(QUESTION),
        lambda client: anext(client.stream(QUESTION)),
        lambda client: anext(client.generate_batch([QUESTION])),
        lambda client: client.wait_until_ready(),
    ],
    ids=["chat", "stream", "generate_batch", "wait_until_ready"],
)
def test_an_asyncio_client_in_another_loop_than_its_own_says_so(server, call):
    async def make():
        return AsyncClient(server.target)

    async def use(client):
        await call(client)

    client = asyncio.run(make())
    with pytest.raises(RuntimeError, match=r"^this client was made in another event loop"):
        asyncio.run(use(client))


def test_threads_may_share_a_client(connect, server):
    if connect.__name__ == "Blocking":
        pytest.skip("an AsyncClient belongs to one event loop")
    server.says("Hello", " there")
    answers = []
    with connect(server.target) as client:
        threads = [threading.Thread(target=lambda: answers.append(client.chat(QUESTION).content)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == ["Hello there"] * 8
