"""Frames over a socket pair, and how its other end's absence is told."""

from __future__ import annotations

import asyncio
import socket

from parleyd.ipc.framing import read_frame, read_frame_async, send_frame


def test_frames_arrive_whole_and_the_end_is_none() -> None:
    ours, theirs = socket.socketpair()
    stream = theirs.makefile("rb")
    for payload in (b"", b"x", b"y" * 100_000):
        send_frame(ours, payload)
        assert read_frame(stream) == payload
    ours.sendall(b"\0\0\0\x09half")
    ours.close()
    assert read_frame(stream) is None
    stream.close()
    theirs.close()


def test_an_end_that_went_with_bytes_unread_is_an_end() -> None:
    ours, theirs = socket.socketpair()
    stream = theirs.makefile("rb")
    send_frame(theirs, b"never read")
    ours.close()
    assert read_frame(stream) is None
    stream.close()
    theirs.close()


async def test_an_end_that_went_with_bytes_unread_is_an_end_to_the_gateway_too() -> None:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=theirs)
    send_frame(ours, b"read")
    assert await read_frame_async(reader) == b"read"
    writer.write(b"never read")
    await writer.drain()
    ours.close()
    assert await read_frame_async(reader) is None
    writer.close()
