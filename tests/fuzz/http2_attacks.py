"""Attacks on HTTP/2 itself, as octets that follow the preface; none of these clients acknowledges any settings."""

from __future__ import annotations

from tests.support.raw_http2 import frame, grpc_message
from tests.support.requests import ask

_DATA, _HEADERS, _PRIORITY, _RESET, _SETTINGS, _GOAWAY, _WINDOW, _CONTINUATION = 0, 1, 2, 3, 4, 7, 8, 9
_END_STREAM, _END_HEADERS = 1, 4
_MAX_FRAME = 16_000
_FIELDS = {
    b":method": b"POST", b":path": b"/parley.v1.ChatService/Generate", b":scheme": b"http", b":authority": b"x",
    b"te": b"trailers", b"content-type": b"application/grpc",
}  # fmt: skip
# The first entry of HPACK's dynamic table, and one of its static table whose value is empty, in an octet each.
_NEWEST, _EMPTY = b"\xbe", b"\x8f"
_NUM_STREAMS = 2000


def _literal(name: bytes, value: bytes, *, is_kept: bool = False) -> bytes:
    """A header as HPACK writes it out in full; `is_kept` puts it in the dynamic table."""
    return (b"\x40" if is_kept else b"\0") + _string(name) + _string(value)


def _string(octets: bytes) -> bytes:
    length = len(octets)
    if length < 127:
        return bytes([length]) + octets
    length -= 127
    prefix = bytearray(b"\x7f")
    while length > 127:
        prefix.append(length & 127 | 128)
        length >>= 7
    return bytes(prefix) + bytes([length]) + octets


_CALL = b"".join(_literal(name, value) for name, value in _FIELDS.items())
_LONG = grpc_message(ask("!forever", max_new_tokens=4000).SerializeToString())
_BOMB = _literal(b"x-bomb", b"a" * 3900, is_kept=True)


def _headers(stream: int, block: bytes) -> bytes:
    """A whole header block, in as many frames as it takes."""
    parts = [block[start : start + _MAX_FRAME] for start in range(0, len(block), _MAX_FRAME)]
    last = len(parts) - 1
    return b"".join(
        frame(_CONTINUATION if index else _HEADERS, _END_HEADERS if index == last else 0, stream, part)
        for index, part in enumerate(parts)
    )


def _on_streams(call: bytes, after: bytes = b"", kind: int = _RESET, code: bytes = b"\0\0\0\x08") -> bytes:
    """Calls one after the other, each ended by a frame of a kind."""
    streams = range(1, 2 * _NUM_STREAMS, 2)
    body = [frame(_DATA, _END_STREAM, stream, after) if after else b"" for stream in streams]
    return b"".join(
        _headers(stream, call) + data + frame(kind, 0, stream, code) for stream, data in zip(streams, body, strict=True)
    )


ATTACKS = {
    "an HPACK bomb: 58 MB of headers in 19 KB": _headers(1, _CALL + _BOMB + _NEWEST * 15_000),
    "an HPACK bomb on ten streams": _headers(1, _CALL + _BOMB)
    + b"".join(_headers(stream, _CALL + _NEWEST * 4000) for stream in range(3, 23, 2)),
    "50,000 empty headers": _headers(1, _CALL + _EMPTY * 50_000),
    "5,000 new entries of the dynamic table": _headers(
        1, _CALL + b"".join(_literal(b"x%d" % number, b"", is_kept=True) for number in range(5000))
    ),
    "a dynamic table of 2 GiB": _headers(1, b"\x3f\xe1\xff\xff\xff\x07" + _CALL),
    "a Huffman code that is none": _headers(1, _CALL + b"\x40\x01x\x84\xff\xff\xff\xff"),
    "an entry that is not in the table": _headers(1, _CALL + b"\xff\xff\xff\xff\x0f"),
    "every pseudo-header twice": _headers(1, _CALL + _CALL),
    "CONTINUATION without end": frame(_HEADERS, 0, 1, _CALL)
    + b"".join(frame(_CONTINUATION, 0, 1, _literal(b"x-%d" % number, b"a" * 200)) for number in range(2000)),
    "empty CONTINUATION without end": frame(_HEADERS, 0, 1, _CALL) + frame(_CONTINUATION, 0, 1) * 20_000,
    "rapid reset": _on_streams(_CALL),
    "rapid reset of calls that are complete": _on_streams(_CALL, _LONG),
    "the server made to reset": _on_streams(_CALL, _LONG, _WINDOW, b"\0\0\0\0"),
    "streams that never go on": b"".join(_headers(stream, _CALL) for stream in range(1, 2 * _NUM_STREAMS, 2)),
    "metadata of 60 KB on 50 streams": b"".join(
        _headers(stream, _CALL + b"".join(_literal(b"x-%d" % number, b"a" * 1000) for number in range(60)))
        for stream in range(1, 101, 2)
    ),
    "empty DATA": _headers(1, _CALL) + frame(_DATA, 0, 1) * 20_000,
    "priorities": frame(_PRIORITY, 0, 1, b"\0\0\0\0\x10") * 20_000,
    "a window that overflows": frame(_WINDOW, 0, 0, b"\x7f\xff\xff\xff") * 10,
    "settings that change back and forth": b"".join(
        frame(_SETTINGS, 0, 0, b"\0\x04" + window.to_bytes(4, "big")) for window in (1, 60_000) * 1000
    ),
    "many farewells": frame(_GOAWAY, 0, 0, bytes(8)) * 10_000,
}
