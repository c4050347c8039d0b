"""Rebuilds typed errors from failed RPCs. The clients call it wherever gRPC raises."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, Protocol, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from parley_client import errors

DOMAIN = "parley.v1"
DETAILS_KEY = "grpc-status-details-bin"
REQUEST_ID_KEY = "x-request-id"

# Statuses without our ErrorInfo come from the gRPC library or from a proxy; only their code tells anything.
BY_CODE: dict[grpc.StatusCode, type[errors.ParleyError]] = {
    grpc.StatusCode.CANCELLED: errors.Cancelled,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.INTERNAL: errors.Internal,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.MessageTooLarge,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.UNAVAILABLE: errors.ConnectionFailed,
    grpc.StatusCode.UNIMPLEMENTED: errors.Unimplemented,
}

_CODES = {code.value[0]: code for code in grpc.StatusCode}

_Response = TypeVar("_Response")
_Detail = TypeVar("_Detail", bound=Message)
_Metadata = Iterable[tuple[str, str | bytes]] | None


class _FailedCall(Protocol):
    """What the RpcErrors of grpc and grpc.aio have in common."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def initial_metadata(self) -> _Metadata: ...
    def trailing_metadata(self) -> _Metadata: ...


def from_rpc_error(error: grpc.RpcError) -> errors.ParleyError:
    """The typed error for a failed RPC. To be raised `from` the RpcError."""
    call = cast(_FailedCall, error)
    trailers = _first_values(call.trailing_metadata())
    headers = _first_values(call.initial_metadata())
    request_id = trailers.get(REQUEST_ID_KEY) or headers.get(REQUEST_ID_KEY)
    details = _decode_status(trailers.get(DETAILS_KEY))
    return _build(call.code(), details.message or call.details() or "", details, _text(request_id))


def readable(message: _Response | None) -> _Response:
    """The message of an answer. Raises Internal for None: of a unary call gRPC gives that where it ended well without
    any, and of an asyncio one for what cannot be decoded."""
    if message is None:
        text = "the server's answer is missing, or none that this client can read"
        raise _build_from_code(grpc.StatusCode.INTERNAL, text, {})
    return message


def from_proto(proto: status_pb2.Status, request_id: str | None) -> errors.ParleyError:
    """The typed error for a status inside a message, as items of a batch have one."""
    code = _CODES.get(proto.code, grpc.StatusCode.UNKNOWN)
    return _build(code, proto.message, proto, request_id)


def _build(
    code: grpc.StatusCode, message: str, details: status_pb2.Status, request_id: str | None
) -> errors.ParleyError:
    info = _detail(details, error_details_pb2.ErrorInfo)
    bad_request = _detail(details, error_details_pb2.BadRequest)
    retry = _detail(details, error_details_pb2.RetryInfo)
    violations = bad_request.field_violations if bad_request else ()
    common: dict[str, Any] = {
        "code": code,
        "metadata": info.metadata if info else None,
        "request_id": request_id,
        "violations": [errors.Violation(violation.field, violation.description) for violation in violations],
        "retry_after_s": _wait_s(retry) if retry else None,
    }
    if info is None or info.domain != DOMAIN:
        return _build_from_code(code, message, common)
    # A reason that this version does not know must not pass for one of its code's other causes.
    fallback = errors.Unavailable if code is grpc.StatusCode.UNAVAILABLE else errors.ParleyError
    return errors.BY_REASON.get(info.reason, fallback)(message, reason=info.reason, **common)


def _build_from_code(code: grpc.StatusCode, message: str, common: dict[str, Any]) -> errors.ParleyError:
    cls = BY_CODE.get(code, errors.ParleyError)
    # gRPC has no better code for streams that a proxy resets because their server is gone.
    if code is grpc.StatusCode.INTERNAL and "RST_STREAM" in message:
        cls = errors.ConnectionFailed
    # Nor for those whose connection gRPC itself closed because it could not read a frame.
    if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN) and message.startswith("Stream removed"):
        cls = errors.ConnectionFailed
    if cls is errors.ConnectionFailed and "metadata from plugin failed" in message:  # an `api_key` function raised
        cls, message = errors.Unauthenticated, f"no credentials: {message}"
    if cls is errors.ConnectionFailed:
        message = f"connection failed: {message}"
    error = cls(message or code.value[1], **common)
    error.reason = None
    return error


def _decode_status(value: str | bytes | None) -> status_pb2.Status:
    details = status_pb2.Status()
    if isinstance(value, bytes):
        try:
            details.ParseFromString(value)
        except DecodeError:
            # A mangled trailer must not hide the status itself.
            details.Clear()
    return details


def _detail(details: status_pb2.Status, kind: type[_Detail]) -> _Detail | None:
    """The first detail of that kind, if there is one that decodes."""
    for packed in details.details:
        if packed.Is(kind.DESCRIPTOR):
            detail = kind()
            try:
                packed.Unpack(detail)
            except DecodeError:
                continue
            return detail
    return None


def _wait_s(retry: error_details_pb2.RetryInfo) -> float:
    """At most what a thread can wait. Not by `ToTimedelta`, which raises for what can be no Duration."""
    delay_s: float = retry.retry_delay.ToNanoseconds() / 1e9
    return min(delay_s, threading.TIMEOUT_MAX)


def _text(value: str | bytes | None) -> str | None:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _first_values(metadata: _Metadata) -> dict[str, str | bytes]:
    values: dict[str, str | bytes] = {}
    for key, value in metadata or ():
        values.setdefault(key, value)
    return values
