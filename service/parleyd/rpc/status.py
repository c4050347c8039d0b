"""The one table from our errors to gRPC statuses, with `google.rpc` details (api.md, Errors)."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from parleyd.errors import InvalidRequest, ParleyError, Reason

DOMAIN = "parley.v1"
DETAILS_KEY = "grpc-status-details-bin"

CODES: dict[Reason, grpc.StatusCode] = {
    Reason.INVALID_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.PROMPT_TOO_LONG: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.MODEL_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.QUEUE_FULL: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.NOT_READY: grpc.StatusCode.UNAVAILABLE,
    Reason.DRAINING: grpc.StatusCode.UNAVAILABLE,
    Reason.WORKER_LOST: grpc.StatusCode.UNAVAILABLE,
    Reason.UNSUPPORTED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    Reason.PERMISSION_DENIED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.INTERNAL: grpc.StatusCode.INTERNAL,
}

# All of a call's metadata must stay below the 8 KiB that gRPC clients accept by default, so texts and the list of
# violations are cut. Three bytes of UTF-8 take nine in `grpc-message`, four thirds in `…-bin`. The list may be
# longer by one violation, and one more that counts the rest.
_MAX_TEXT = 256
_MAX_TEXT_BYTES = 512
_MAX_VIOLATIONS_BYTES = 5 * 512


def code_of(error: ParleyError) -> grpc.StatusCode:
    """The status code of an error; a subclass has its base's, since it inherits its reason."""
    return CODES[error.reason]


def to_status(error: ParleyError, request_id: str) -> status_pb2.Status:
    """The whole status of a failed call. A fault of ours tells the request's id and nothing else."""
    is_fault = error.reason is Reason.INTERNAL
    message = f"internal error (request {request_id})" if is_fault else _shorten(error.message)
    code = code_pb2.Code.Value(code_of(error).name)
    return status_pb2.Status(code=code, message=message, details=_details(error))


def _details(error: ParleyError) -> list[any_pb2.Any]:
    info = error_details_pb2.ErrorInfo(domain=DOMAIN, reason=error.reason.value)
    info.metadata.update({key: _shorten(value) for key, value in error.metadata.items()})
    details = [_pack(info)]
    if isinstance(error, InvalidRequest):
        details.append(_pack(_bad_request(error)))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    return details


def _bad_request(error: InvalidRequest) -> error_details_pb2.BadRequest:
    bad_request = error_details_pb2.BadRequest()
    for i, violation in enumerate(error.violations):
        if bad_request.ByteSize() > _MAX_VIOLATIONS_BYTES:
            bad_request.field_violations.add(description=error.rest(i))
            break
        bad_request.field_violations.add(field=_shorten(violation.field), description=_shorten(violation.description))
    return bad_request


def _pack(
    message: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo,
) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _shorten(text: str) -> str:
    text = text.encode(
        errors="replace"
    ).decode()  # templates may quote half of a surrogate pair, which no message holds
    if len(text) <= _MAX_TEXT and len(text.encode()) <= _MAX_TEXT_BYTES:
        return text
    return text[: _MAX_TEXT - 1].encode()[: _MAX_TEXT_BYTES - 3].decode(errors="ignore") + "…"
