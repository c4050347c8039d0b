"""The clients and the real gateway together."""

from __future__ import annotations

import pytest

from parley_client import FinishReason, HealthStatus, InvalidRequest, ModelNotFound, PromptTooLong, user
from parley_client.cli import main


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
    assert chatting.model_info().model == "scripted"


def test_the_command_line_reaches_the_gateway(gateway, capsys):
    assert main(["health", "--target", gateway.target]) == 0
    assert main(["generate", "Hello", "--target", gateway.target]) == 0
    assert capsys.readouterr().out == "SERVING\nHello\n"
