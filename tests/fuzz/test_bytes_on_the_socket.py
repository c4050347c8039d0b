"""What no gRPC library sends: the server answers with an error or closes that connection, and serves all others."""

from __future__ import annotations

import gzip
import os
import random
import socket
import struct
import time
from collections.abc import Iterator

import grpc
import h2.config
import h2.connection
import h2.events
import h2.exceptions
import pytest

from parley.v1 import chat_pb2_grpc
from tests.fuzz.conftest import CLIENT_CODES, SECONDS, memory_of
from tests.support.replica import Replica
from tests.support.requests import ask

_CLIENT_ERRORS = {str(code.value[0]) for code in CLIENT_CODES} | {"1", "13"}
_PATIENCE_S = 10.0
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_PAYLOAD = ask("hello").SerializeToString()
_FRAME = b"\0" + struct.pack(">I", len(_PAYLOAD)) + _PAYLOAD


class RawCall:
    """One HTTP/2 stream whose headers and bytes are ours to choose."""

    def __init__(self, address: str) -> None:
        host, port = address.split(":")
        self._socket = socket.create_connection((host, int(port)), timeout=_PATIENCE_S)
        self._connection = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=True, validate_outbound_headers=False, header_encoding="utf-8")
        )
        self._connection.initiate_connection()

    def begin(self, path: str = "/parley.v1.ChatService/Generate", **headers: str) -> None:
        fields = {
            ":method": "POST", ":path": path, ":scheme": "http", ":authority": "fuzz", "te": "trailers",
            "content-type": "application/grpc",
        } | {name.replace("_", "-"): value for name, value in headers.items()}  # fmt: skip
        self._connection.send_headers(1, list(fields.items()))

    def send(self, data: bytes, *, ends: bool = True) -> None:
        for start in range(0, max(len(data), 1), 16_000):
            part = data[start : start + 16_000]
            while self._connection.local_flow_control_window(1) < len(part):
                self._flush()
                self._connection.receive_data(self._socket.recv(65536) or b"")
            self._connection.send_data(1, part, end_stream=ends and start + 16_000 >= len(data))
        self._flush()

    def status(self) -> str:
        """The grpc-status, or how else the call ended."""
        self._flush()
        while True:
            try:
                received = self._socket.recv(65536)
                events = self._connection.receive_data(received) if received else [h2.events.ConnectionTerminated()]
            except TimeoutError:
                return "open"
            except (ConnectionError, h2.exceptions.ProtocolError):
                return "closed"
            for event in events:
                if isinstance(event, h2.events.TrailersReceived | h2.events.ResponseReceived):
                    headers = dict(event.headers)
                    if "grpc-status" in headers:
                        return headers["grpc-status"]
                    if headers.get(":status", "200") != "200":
                        return "closed"
                if isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated):
                    return "closed"
            self._flush()

    def set_patience(self, seconds: float) -> None:
        """How long to wait for an answer."""
        self._socket.settimeout(seconds)

    def close(self) -> None:
        self._socket.close()

    def _flush(self) -> None:
        self._socket.sendall(self._connection.data_to_send())


@pytest.fixture
def raw(replica: Replica) -> Iterator[RawCall]:
    call = RawCall(replica.address)
    yield call
    call.close()


@pytest.fixture(autouse=True)
def served_after(channel: grpc.Channel) -> Iterator[None]:
    """Whatever a test sends, others are served."""
    yield
    response = chat_pb2_grpc.ChatServiceStub(channel).Generate(ask("still here"), timeout=20)
    assert response.choices[0].message.content == "still here"


CALLS: dict[str, tuple[dict[str, str], bytes]] = {
    "a frame cut short": ({}, _FRAME[:-3]),
    "a prefix alone": ({}, _FRAME[:3]),
    "nothing": ({}, b""),
    "a length of 4 GiB": ({}, b"\0\xff\xff\xff\xff" + _PAYLOAD),
    "compressed, it says": ({}, b"\1" + _FRAME[1:]),
    "compressed with what there is not": ({"grpc_encoding": "brotli"}, b"\1" + _FRAME[1:]),
    "gzip that is none": ({"grpc_encoding": "gzip"}, b"\1" + _FRAME[1:]),
    "a gzip bomb": (
        {"grpc_encoding": "gzip"},
        b"\1" + struct.pack(">I", len(bomb := gzip.compress(bytes(50_000_000)))) + bomb,
    ),
    "a flag of 255": ({}, b"\xff" + _FRAME[1:]),
    "two messages": ({}, _FRAME * 2),
    "100,000 messages": ({}, b"\0\0\0\0\0" * 100_000),
    "text that is no UTF-8": ({}, b"\0\0\0\0\x04\x0a\x02\xff\xfe"),
    "another content type": ({"content_type": "application/json"}, _FRAME),
    "a deadline that is none": ({"grpc_timeout": "soon"}, _FRAME),
    "a deadline without end": ({"grpc_timeout": "99999999H"}, _FRAME),
    "no time at all": ({"grpc_timeout": "0n"}, _FRAME),
    "a request id that is none": ({"x_request_id": "a b\tc"}, _FRAME),
    "a trace context that is none": ({"traceparent": "00-zz-zz-zz"}, _FRAME),
    "a long header": ({"x_long": "x" * 6000}, _FRAME),
    "a header too long": ({"x_long": "x" * 100_000}, _FRAME),
    "binary metadata that is none": ({"x_fuzz_bin": "%%%"}, _FRAME),
}


# gRPC Python takes them for calls that were cancelled as they began, and waits for their client to reset them.
UNANSWERED = {"a frame cut short", "a prefix alone", "nothing"}


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_no_library_makes(raw: RawCall, name: str) -> None:
    headers, body = CALLS[name]
    if name in UNANSWERED:
        raw.set_patience(0.5)
    try:
        raw.begin(**headers)
        raw.send(body)
    except (ConnectionError, h2.exceptions.ProtocolError):
        return  # closed already
    assert raw.status() in {*_CLIENT_ERRORS, "open" if name in UNANSWERED else "closed"}


@pytest.mark.parametrize("path", ["/", "//", "/parley.v1.ChatService/", "/parley.v1.ChatService/Nothing", "/a" * 2000])
def test_paths_that_lead_nowhere(raw: RawCall, path: str) -> None:
    raw.begin(path)
    raw.send(_FRAME)
    assert raw.status() in {*_CLIENT_ERRORS, "closed"}


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # a TLS hello
        _PREFACE,
        _PREFACE + bytes(1000),
        _PREFACE + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01",  # a frame of 16 MiB
        _PREFACE + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00" + b"\x00\x00\x08\x06\x00\x00\x00\x00\x00pingping" * 5000,
        _PREFACE + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00" * 5000,
        b"",
    ],
)
def test_bytes_that_are_no_call(replica: Replica, data: bytes) -> None:
    _send_bytes(replica, data)


def test_random_frames(replica: Replica) -> None:
    chance = random.Random(7)
    end = time.monotonic() + SECONDS / 6
    while time.monotonic() < end:
        data = _PREFACE + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
        for _ in range(chance.randint(1, 20)):
            body = chance.randbytes(chance.choice([0, 4, 8, 30, 300]))
            kind, flags, stream = chance.randrange(12), chance.randrange(256), chance.choice([0, 1, 3, 2**31 - 1])
            data += struct.pack(">I", len(body))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + body
        _send_bytes(replica, data)


def _send_bytes(replica: Replica, data: bytes) -> None:
    host, port = replica.address.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        try:
            raw.sendall(data)
            raw.settimeout(0.05)
            raw.recv(1000)
        except OSError:
            pass


def test_memory_is_given_back(replica: Replica, channel: grpc.Channel) -> None:
    """Each kind of abuse again and again, once before it is measured and then more often."""

    def abuse(number: int) -> None:
        for _ in range(number):
            for name in CALLS:
                _make_call(replica, name)
            _send_bytes(replica, os.urandom(10_000))

    abuse(3)
    before = memory_of(replica)
    abuse(max(3, int(SECONDS / 6)))
    deadline = time.monotonic() + 20
    while memory_of(replica) > 1.05 * before:
        assert time.monotonic() < deadline, (before, memory_of(replica))
        time.sleep(0.2)


def _make_call(replica: Replica, name: str) -> None:
    headers, body = CALLS[name]
    call = RawCall(replica.address)
    try:
        call.begin(**headers)
        call.send(body)
        if name not in UNANSWERED:
            call.status()
    except (OSError, h2.exceptions.ProtocolError):
        pass
    finally:
        call.close()
