"""What no gRPC library sends: the server answers with an error or closes that connection, and serves all others."""

from __future__ import annotations

import gzip
import os
import random
import struct
import time
from collections.abc import Iterator
from contextlib import suppress

import grpc
import h2.exceptions
import pytest

from parley.v1 import chat_pb2_grpc
from tests.fuzz.conftest import CLIENT_CODES, SECONDS, memory_of
from tests.fuzz.http2_attacks import ATTACKS
from tests.support.raw_http2 import EMPTY_SETTINGS, PREFACE, RawConnection, frame, grpc_message, open_socket
from tests.support.replica import Replica
from tests.support.requests import ask

_CLIENT_ERRORS = {str(code.value[0]) for code in CLIENT_CODES} | {"1", "13"}
_PAYLOAD = ask("hello").SerializeToString()
_FRAME = grpc_message(_PAYLOAD)


def status_of(call: RawConnection) -> str:
    """The grpc-status, or how else the call ended."""
    try:
        return call.status() or "closed"
    except TimeoutError:
        return "open"


@pytest.fixture
def raw(replica: Replica) -> Iterator[RawConnection]:
    with RawConnection(replica.address) as call:
        yield call


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
    "compressed with what there is not": ({"grpc-encoding": "brotli"}, b"\1" + _FRAME[1:]),
    "gzip that is none": ({"grpc-encoding": "gzip"}, b"\1" + _FRAME[1:]),
    "a gzip bomb": (
        {"grpc-encoding": "gzip"},
        b"\1" + struct.pack(">I", len(bomb := gzip.compress(bytes(50_000_000)))) + bomb,
    ),
    "a flag of 255": ({}, b"\xff" + _FRAME[1:]),
    "two messages": ({}, _FRAME * 2),
    "100,000 messages": ({}, b"\0\0\0\0\0" * 100_000),
    "text that is no UTF-8": ({}, b"\0\0\0\0\x04\x0a\x02\xff\xfe"),
    "another content type": ({"content-type": "application/json"}, _FRAME),
    "a deadline that is none": ({"grpc-timeout": "soon"}, _FRAME),
    "a deadline without end": ({"grpc-timeout": "99999999H"}, _FRAME),
    "no time at all": ({"grpc-timeout": "0n"}, _FRAME),
    "a request id that is none": ({"x-request-id": "a b\tc"}, _FRAME),
    "a trace context that is none": ({"traceparent": "00-zz-zz-zz"}, _FRAME),
    "a long header": ({"x-long": "x" * 6000}, _FRAME),
    "a header too long": ({"x-long": "x" * 100_000}, _FRAME),
    "binary metadata that is none": ({"x-fuzz-bin": "%%%"}, _FRAME),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_no_library_makes(raw: RawConnection, name: str) -> None:
    headers, body = CALLS[name]
    try:
        raw.begin(extra=headers)
        raw.send(body)
    except (ConnectionError, h2.exceptions.ProtocolError):
        return  # closed already
    assert status_of(raw) in {*_CLIENT_ERRORS, "closed"}


@pytest.mark.parametrize("path", ["/", "//", "/parley.v1.ChatService/", "/parley.v1.ChatService/Nothing", "/a" * 2000])
def test_paths_that_lead_nowhere(raw: RawConnection, path: str) -> None:
    raw.begin(path=path)
    raw.send(_FRAME)
    assert status_of(raw) in {*_CLIENT_ERRORS, "closed"}


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # a TLS hello
        PREFACE,
        PREFACE + bytes(1000),
        PREFACE + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01",  # a frame of 16 MiB
        PREFACE + EMPTY_SETTINGS + frame(6, 0, 0, b"pingping") * 5000,
        PREFACE + EMPTY_SETTINGS * 5001,
        b"",
    ],
)
def test_bytes_that_are_no_call(replica: Replica, data: bytes) -> None:
    _send_bytes(replica, data)


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_on_http2(replica: Replica, name: str) -> None:
    before = memory_of(replica)
    _send_bytes(replica, PREFACE + EMPTY_SETTINGS + ATTACKS[name], read_for_s=0.3)
    assert memory_of(replica) < before + 128 * 1024 * 1024


def test_random_frames(replica: Replica) -> None:
    chance = random.Random(7)
    end = time.monotonic() + SECONDS / 6
    num_sent = 0
    while time.monotonic() < end:
        data = PREFACE + EMPTY_SETTINGS
        for _ in range(chance.randint(1, 20)):
            body = chance.randbytes(chance.choice([0, 4, 8, 30, 300]))
            kind, flags, stream = chance.randrange(12), chance.randrange(256), chance.choice([0, 1, 3, 2**31 - 1])
            data += frame(kind, flags, stream, body)
        _send_bytes(replica, data)
        num_sent += 1
    print(f"\nconnections with random frames: {num_sent:,}")


def _send_bytes(replica: Replica, data: bytes, read_for_s: float = 0.05) -> None:
    end = time.monotonic() + read_for_s
    with open_socket(replica.address) as raw, suppress(OSError):
        raw.sendall(data)
        while (left := end - time.monotonic()) > 0:
            raw.settimeout(left)
            if not raw.recv(65536):
                return


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
    try:
        with RawConnection(replica.address) as call:
            call.begin(extra=headers)
            call.send(body)
            status_of(call)
    except (OSError, h2.exceptions.ProtocolError):
        pass
