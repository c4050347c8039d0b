"""CountTokens counts what Generate would compute, whatever the prompt is made of."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct

from parley.v1 import chat_pb2
from tests.integration.conftest import StartGateway
from tests.support.gateway import GatewayThread
from tests.support.requests import ask, reason_of
from tests.support.tiny_tokenizer import CHATML_TEMPLATE, write_tiny_tokenizer


def count(gateway: GatewayThread, request: chat_pb2.GenerateRequest) -> int:
    """The tokens of a GenerateRequest's prompt."""
    fields = {field.name for field in chat_pb2.CountTokensRequest.DESCRIPTOR.fields}
    shared = {field.name: value for field, value in request.ListFields() if field.name in fields}
    response = gateway.stub.CountTokens(chat_pb2.CountTokensRequest(**shared), timeout=20)
    assert response.prompt_tokens == gateway.stub.Generate(request, timeout=20).usage.prompt_tokens
    return response.prompt_tokens


def test_a_message_to_be_continued_has_no_end(gateway: GatewayThread) -> None:
    begun = ("say abc", "abc")
    assert count(gateway, ask(*begun, continue_final_message=True)) < count(gateway, ask(*begun))


def test_variables_of_the_chat_template_count(start_gateway: StartGateway, tmp_path: Path) -> None:
    template = "{% if hint %}{{ hint }}{% endif %}" + CHATML_TEMPLATE
    gateway = start_gateway(folder=write_tiny_tokenizer(tmp_path, chat_template=template))
    kwargs = Struct()
    kwargs.update({"hint": "x" * 10})
    assert count(gateway, ask("hi", chat_template_kwargs=kwargs)) == count(gateway, ask("hi")) + 10


def test_another_model_is_not_found(gateway: GatewayThread) -> None:
    messages = ask("hi").messages
    assert gateway.stub.CountTokens(chat_pb2.CountTokensRequest(model="scripted", messages=messages), timeout=20)
    with pytest.raises(grpc.RpcError) as raised:
        gateway.stub.CountTokens(chat_pb2.CountTokensRequest(model="gpt-5", messages=messages), timeout=20)
    assert (raised.value.code(), reason_of(raised.value)) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
