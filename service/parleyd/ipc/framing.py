"""Frames on the socket pair between gateway and worker: a 4-byte big-endian length, then that many bytes."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import BinaryIO

_LENGTH = struct.Struct(">I")


def frame(payload: bytes) -> bytes:
    """The payload with its length in front."""
    return _LENGTH.pack(len(payload)) + payload


def read_frame(stream: BinaryIO) -> bytes | None:
    """The next payload of a blocking stream, or None when the other end is gone."""
    try:
        header = stream.read(_LENGTH.size)
        if len(header) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack(header)
        payload = stream.read(length)
    except ConnectionError:  # it went with bytes of ours unread
        return None
    return payload if len(payload) == length else None


async def read_frame_async(reader: asyncio.StreamReader) -> bytes | None:
    """The next payload of an asyncio stream, or None when the other end is gone."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def send_frame(sock: socket.socket, payload: bytes) -> None:
    """Sends a payload on a blocking socket."""
    sock.sendall(frame(payload))
