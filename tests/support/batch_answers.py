"""Answers to items of a batch, as a scripted server gives them."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from parley.v1 import chat_pb2


def answered(index, text="Hello"):
    message = {"role": "ROLE_ASSISTANT", "content": text}
    response = chat_pb2.GenerateResponse(choices=[{"message": message}], usage={"completion_tokens": 1})
    return chat_pb2.GenerateBatchResponse(index=index, response=response)


def failed(index, code, reason, retry_s=None):
    error = status_pb2.Status(code=code.value[0], message="as scripted")
    error.details.add().Pack(error_details_pb2.ErrorInfo(domain="parley.v1", reason=reason))
    if retry_s is not None:
        delay = Duration()
        delay.FromNanoseconds(int(retry_s * 1e9))
        error.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return chat_pb2.GenerateBatchResponse(index=index, error=error)


def content(request):
    return request.messages[-1].content
