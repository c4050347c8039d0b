"""Requests and what comes back, for tests that talk to the stubs directly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from parley.v1 import chat_pb2, generation_pb2, message_pb2


def ask(*contents: str, system: str | None = None, **fields: Any) -> chat_pb2.GenerateRequest:
    """A request whose messages alternate between user and assistant. `fields`: the request's, else its config's."""
    messages = [message_pb2.Message(role=message_pb2.ROLE_SYSTEM, content=system)] if system is not None else []
    for i, content in enumerate(contents):
        role = message_pb2.ROLE_ASSISTANT if i % 2 else message_pb2.ROLE_USER
        messages.append(message_pb2.Message(role=role, content=content))
    of_request = {
        name: fields.pop(name) for name in list(fields) if name in chat_pb2.GenerateRequest.DESCRIPTOR.fields_by_name
    }
    config = generation_pb2.GenerationConfig(**fields)
    return chat_pb2.GenerateRequest(messages=messages, generation_config=config, **of_request)


def status_of(error: grpc.RpcError) -> status_pb2.Status:
    """The rich status in a failed call's trailers."""
    trailers = dict([*(error.trailing_metadata() or ())])  # of gRPC 1.71, dict() takes no Metadata itself
    return status_pb2.Status.FromString(trailers["grpc-status-details-bin"])


def reason_of(error: grpc.RpcError) -> str:
    """The ErrorInfo's reason."""
    return error_info_of(error).reason


def error_info_of(error: grpc.RpcError) -> error_details_pb2.ErrorInfo:
    info = error_details_pb2.ErrorInfo()
    assert status_of(error).details[0].Unpack(info)
    assert info.domain == "parley.v1"
    return info


def violated_fields(error: grpc.RpcError) -> list[str]:
    """The field paths of the BadRequest."""
    return [violation.field for violation in violations_of(error)]


def violations_of(error: grpc.RpcError) -> Sequence[error_details_pb2.BadRequest.FieldViolation]:
    """What the BadRequest holds."""
    bad_request = error_details_pb2.BadRequest()
    assert status_of(error).details[1].Unpack(bad_request)
    return bad_request.field_violations


def retry_delay_of(error: grpc.RpcError) -> float:
    """The RetryInfo's delay, in seconds."""
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status_of(error).details)
    return retry.retry_delay.ToTimedelta().total_seconds()
