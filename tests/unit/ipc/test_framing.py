"""Frames over a socket pair, and how its other end's absence is told."""

from __future__ import annotations

import socket

from parleyd.ipc.framing import read_frame, send_frame


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
