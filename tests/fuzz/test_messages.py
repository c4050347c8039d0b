"""Any message, and bytes that nearly are one, to every method: the answer is the client's fault or no fault at all."""

from __future__ import annotations

from collections.abc import Callable

import grpc
from hypothesis import given, settings
from hypothesis import strategies as st

from parley.v1 import chat_pb2
from tests.fuzz.conftest import CLIENT_CODES
from tests.fuzz.messages import messages

SERVICE = chat_pb2.DESCRIPTOR.services_by_name["ChatService"]
METHODS = [method.name for method in SERVICE.methods]
_TIMEOUT_S = 20.0


def code_of(channel: grpc.Channel, method: str, data: bytes) -> grpc.StatusCode:
    """Sends bytes to a method, reads all that comes back."""
    path = f"/{SERVICE.full_name}/{method}"
    call = channel.unary_stream(path, request_serializer=bytes, response_deserializer=bytes)(data, timeout=_TIMEOUT_S)
    try:
        for _ in call:
            pass
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return grpc.StatusCode.OK


@given(st.data())
@settings(settings.get_profile("fuzz"))
def test_any_message(channel: grpc.Channel, data: st.DataObject) -> None:
    method = data.draw(st.sampled_from(METHODS))
    descriptor = SERVICE.methods_by_name[method].input_type
    message = data.draw(messages(descriptor))
    assert code_of(channel, method, message.SerializeToString()) in CLIENT_CODES


@given(st.data())
@settings(settings.get_profile("fuzz"))
def test_a_message_that_is_nearly_right(channel: grpc.Channel, data: st.DataObject) -> None:
    """Right enough to be generated for, but for one message of its parts."""
    request = chat_pb2.GenerateRequest(generation_config={"max_new_tokens": 5})
    request.messages.add(role=2, content="hello")
    request.MergeFrom(data.draw(messages(chat_pb2.GenerateRequest.DESCRIPTOR)))
    for message in request.messages:
        message.role = message.role or 2
    assert code_of(channel, "GenerateStream", request.SerializeToString()) in CLIENT_CODES


@given(st.data())
@settings(settings.get_profile("fuzz"))
def test_mutated_bytes(channel: grpc.Channel, data: st.DataObject) -> None:
    method = data.draw(st.sampled_from(METHODS))
    original = data.draw(messages(SERVICE.methods_by_name[method].input_type)).SerializeToString()
    mutate: Callable[[bytes], bytes] = data.draw(st.sampled_from([_truncate, _flip, _append, _repeat]))(data)
    assert code_of(channel, method, mutate(original)) in CLIENT_CODES


def _truncate(data: st.DataObject) -> Callable[[bytes], bytes]:
    share = data.draw(st.floats(0, 1))
    return lambda original: original[: int(len(original) * share)]


def _flip(data: st.DataObject) -> Callable[[bytes], bytes]:
    places = data.draw(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1))

    def flip(original: bytes) -> bytes:
        changed = bytearray(original or b"\0")
        for share, bits in places:
            changed[int(len(changed) * share)] ^= bits
        return bytes(changed)

    return flip


def _append(data: st.DataObject) -> Callable[[bytes], bytes]:
    tail = data.draw(st.binary(min_size=1, max_size=100))
    return lambda original: original + tail


def _repeat(data: st.DataObject) -> Callable[[bytes], bytes]:
    number = data.draw(st.integers(2, 50))
    return lambda original: original * number


def test_nesting_of_any_depth(channel: grpc.Channel) -> None:
    for depth in (1, 10, 40, 90, 100, 1000, 10_000):
        value = b""
        for _ in range(depth):
            field = b"\x0a\x01k\x12" + _length(b"\x2a" + _length(value) + value) + b"\x2a" + _length(value) + value
            value = b"\x0a" + _length(field) + field  # Struct { fields { key: "k" value { struct_value { … } } } }
        kwargs = value
        number = chat_pb2.GenerateRequest.DESCRIPTOR.fields_by_name["chat_template_kwargs"].number
        request = chat_pb2.GenerateRequest(generation_config={"max_new_tokens": 5})
        request.messages.add(role=2, content="hello")
        data = request.SerializeToString() + _length(number << 3 | 2) + _length(kwargs) + kwargs
        if len(data) < 4_000_000:
            assert code_of(channel, "Generate", data) in CLIENT_CODES, depth


def _length(value: bytes | int) -> bytes:
    """A length, or a number, as a varint."""
    number = value if isinstance(value, int) else len(value)
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
