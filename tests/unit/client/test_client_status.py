"""How errors are rebuilt from a failed RPC, and what they are to Python."""

from __future__ import annotations

import pickle
import threading

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

import parley_client
from parley.v1 import errors_pb2
from parley_client import InvalidRequest, ParleyError, QueueFull, Violation, errors, status


class FailedCall(grpc.RpcError):
    """What gRPC raises, as far as the client looks at it."""

    def __init__(self, code, details="", headers=(), trailers=()):
        self.code = lambda: code
        self.details = lambda: details
        self.initial_metadata = lambda: headers
        self.trailing_metadata = lambda: trailers


def packed(*details, message=""):
    rich = status_pb2.Status(message=message)
    for detail in details:
        rich.details.add().Pack(detail)
    return rich.SerializeToString()


def test_every_reason_of_the_contract_has_a_class_of_its_own():
    names = {name.removeprefix("ERROR_REASON_") for name in errors_pb2.ErrorReason.keys()}  # noqa: SIM118
    assert errors.BY_REASON.keys() == names - {"UNSPECIFIED"}
    assert len(set(errors.BY_REASON.values())) == len(errors.BY_REASON)


def test_all_errors_are_parley_errors_and_exported():
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert all(issubclass(cls, ParleyError) and cls.__name__ in parley_client.__all__ for cls in classes)


def test_details_fill_in_the_error():
    info = error_details_pb2.ErrorInfo(domain="parley.v1", reason="QUEUE_FULL", metadata={"waiting": "9"})
    retry = error_details_pb2.RetryInfo(retry_delay=Duration(nanos=250_000_000))
    trailers = [("grpc-status-details-bin", packed(info, retry, message="full, whole")), ("x-request-id", "r-1")]
    error = status.from_rpc_error(FailedCall(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", trailers=trailers))
    assert isinstance(error, QueueFull)
    assert (error.message, error.metadata, error.retry_after_s) == ("full, whole", {"waiting": "9"}, 0.25)
    assert error.request_id == "r-1"


@pytest.mark.parametrize("seconds", [315_576_000_000, 2**63 - 1], ids=["ten thousand years", "no duration"])
def test_however_long_a_delay_is_the_error_has_its_name_and_can_be_waited_for(seconds):
    info = error_details_pb2.ErrorInfo(domain="parley.v1", reason="QUEUE_FULL")
    retry = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=seconds))
    call = FailedCall(grpc.StatusCode.RESOURCE_EXHAUSTED, trailers=[("grpc-status-details-bin", packed(info, retry))])
    error = status.from_rpc_error(call)
    assert (type(error), error.retry_after_s) == (QueueFull, threading.TIMEOUT_MAX)


def test_the_request_id_may_stand_in_the_headers():
    call = FailedCall(grpc.StatusCode.INTERNAL, headers=[("x-request-id", "r-2")])
    assert status.from_rpc_error(call).request_id == "r-2"


def test_a_call_without_any_metadata_is_told_by_its_code():
    error = status.from_rpc_error(FailedCall(grpc.StatusCode.CANCELLED, None, headers=None, trailers=None))
    assert (type(error), error.message, error.request_id) == (parley_client.Cancelled, "cancelled", None)


@pytest.mark.parametrize("value", [b"\xff", b"\x12\x03odd\xff", "text", b""])
def test_mangled_details_are_passed_over(value):
    trailers = [("grpc-status-details-bin", value)]
    error = status.from_rpc_error(FailedCall(grpc.StatusCode.UNAVAILABLE, "gone", trailers=trailers))
    assert (type(error), error.message) == (parley_client.ConnectionFailed, "connection failed: gone")


def test_a_detail_that_does_not_decode_is_passed_over():
    rich = status_pb2.Status()
    rich.details.add(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff")
    trailers = [("grpc-status-details-bin", rich.SerializeToString())]
    error = status.from_rpc_error(FailedCall(grpc.StatusCode.NOT_FOUND, "gone", trailers=trailers))
    assert (type(error), error.code) == (ParleyError, grpc.StatusCode.NOT_FOUND)


def test_errors_survive_pickling():
    error = InvalidRequest.at("messages[0].content", "is odd")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.violations) == (InvalidRequest, str(error), error.violations)
    assert copy.violations == (Violation("messages[0].content", "is odd"),)


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        (grpc.StatusCode.UNKNOWN, "Failed parsing HTTP/2 (Frame size 16777215 is larger than max frame size 4194304)"),
        (grpc.StatusCode.INTERNAL, "frame of size 16384 overflows local window of 0"),
    ],
)
def test_a_connection_whose_frames_cannot_be_read_is_a_broken_one(code, fault):
    error = status.from_rpc_error(FailedCall(code, f"Stream removed ({fault})"))
    assert (type(error), error.code) == (parley_client.ConnectionFailed, code)
    assert type(status.from_rpc_error(FailedCall(grpc.StatusCode.UNKNOWN, "odd"))) is ParleyError


def test_a_proxys_reset_is_a_broken_connection_and_the_servers_own_fault_is_not():
    reset = FailedCall(grpc.StatusCode.INTERNAL, "Stream removed (RST_STREAM (Received RST_STREAM with error code 2))")
    assert type(status.from_rpc_error(reset)) is parley_client.ConnectionFailed
    fault = FailedCall(grpc.StatusCode.INTERNAL, "internal error (request r-1)")
    assert type(status.from_rpc_error(fault)) is parley_client.Internal
