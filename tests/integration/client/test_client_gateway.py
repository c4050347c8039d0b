"""The clients and the real gateway together."""

from __future__ import annotations

import os
import signal
import time

import pytest

from parley_client import FinishReason, HealthStatus, InvalidRequest, ModelNotFound, PromptTooLong, TopLogprob, user
from parley_client.cli import main
from tests.support.tiny_tokenizer import IM_END_ID


@pytest.fixture
def chatting(connect, gateway):
    with connect(gateway.target) as client:
        yield client


def test_a_streamed_answer_is_the_whole_answer(chatting):
    whole = chatting.chat([user("Hello, world!")], max_new_tokens=512)
    stream = chatting.stream([user("Hello, world!")], max_new_tokens=512)
    assert "".join(str(piece) for piece in stream) == whole.content == "Hello, world!"
    assert stream.reply.token_ids == whole.token_ids
    assert stream.reply.usage.completion_tokens == whole.usage.completion_tokens == len(whole.token_ids)
    assert stream.reply.finish_reason is whole.finish_reason is FinishReason.STOP


def test_conversations_go_on_with_the_reply(chatting):
    messages = [user("One")]
    messages.append(chatting.chat(messages))
    messages.append(user("Two"))
    assert chatting.chat(messages).content == "Two"
    assert chatting.count_tokens(messages) > chatting.count_tokens(messages[:1])


def test_leaving_a_stream_leaves_the_gateway_idle(chatting, gateway):
    with chatting.stream([user("!forever")], max_new_tokens=4000) as stream:
        next(stream)
    gateway.wait_idle()


def test_the_gateways_errors_are_typed(chatting, gateway):
    with pytest.raises(InvalidRequest) as invalid:
        chatting.chat([user("Hi")], temperature=11, top_p=0)
    fields = {violation.field for violation in invalid.value.violations}
    assert fields == {"generation_config.temperature", "generation_config.top_p"}
    assert invalid.value.request_id
    with pytest.raises(ModelNotFound) as not_found:
        chatting.model_info("another")
    assert not_found.value.served == ("scripted",)
    with pytest.raises(PromptTooLong) as too_long:
        chatting.chat([user("x" * 10_000)])
    assert too_long.value.prompt_tokens > too_long.value.max_context_tokens == chatting.model_info().max_context_tokens


def test_the_gateway_is_healthy_and_tells_what_it_serves(chatting):
    chatting.wait_until_ready(timeout=20)
    assert chatting.health() is chatting.health("parley.v1.ChatService") is HealthStatus.SERVING
    assert chatting.health("parley.v1.OtherService") is HealthStatus.SERVICE_UNKNOWN
    assert chatting.model_info().model == "scripted"


@pytest.mark.parametrize("stop", ["drain", "worker"])
def test_a_stream_goes_on_at_another_server(connect, start_gateway, stop):
    text = "naïve 家族 👨‍👩‍👧‍👦 " * 12
    slow = {"worker": ("--step-delay", "0.005"), "drain_timeout": 0.0, "max_worker_restarts": 0}
    gateways = [start_gateway(**slow) for _ in range(2)]
    with connect("ipv4:" + ",".join(gateway.target for gateway in gateways)) as client:
        client.wait_until_ready(timeout=20)
        stream = client.stream([user(text)], top_logprobs=2)
        pieces = [next(stream) for _ in range(20)]
        (serving,) = [gateway for gateway in gateways if gateway.gateway.admission.num_running]
        if stop == "drain":
            serving.loop.call_soon_threadsafe(serving.gateway.begin_shutdown)
        else:
            os.kill(serving.gateway.supervisor.worker_pid, signal.SIGKILL)
        pieces += stream
        assert "".join(map(str, pieces)) == stream.reply.content == text
        assert stream.reply.token_ids == [*text.encode(), IM_END_ID]
        assert [one.token_id for one in stream.reply.logprobs] == stream.reply.token_ids
        assert stream.reply.usage.completion_tokens == len(stream.reply.token_ids)
        (other,) = [gateway for gateway in gateways if gateway is not serving]
        other.wait_idle()


def test_several_answers_and_their_logprobs_are_typed(chatting):
    reply = chatting.chat([user("!choice")], num_return_sequences=2, do_sample=True, top_logprobs=2)
    assert [choice.content for choice in reply.choices] == ["choice 0", "choice 1"]
    (first, *_) = reply.choices[1].logprobs
    assert (first.token_id, first.token, first.bytes) == (ord("c"), "c", b"c")
    assert first.top[0] == TopLogprob(ord("c"), "c", b"c", first.logprob)
    assert len(first.top) == 2


def test_calls_take_turns_among_the_addresses_of_a_target(connect, start_gateway):
    gateways = [start_gateway() for _ in range(2)]
    with connect("ipv4:" + ",".join(gateway.target for gateway in gateways)) as client:
        client.wait_until_ready(timeout=20)
        streams = []
        deadline = time.monotonic() + 20
        while not all(gateway.gateway.admission.num_running for gateway in gateways):
            assert time.monotonic() < deadline
            streams.append(client.stream([user("!wait")]))
            time.sleep(0.05)
        for stream in streams:
            stream.cancel()


def test_the_command_line_reaches_the_gateway(gateway, capsys):
    assert main(["health", "--target", gateway.target]) == 0
    assert main(["generate", "Hello", "--target", gateway.target]) == 0
    assert capsys.readouterr().out == "SERVING\nHello\n"
