"""An HTTP/2 connection whose every header and octet is ours to choose: clients that behave as no library lets them."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
from google.protobuf.message import Message

from tests.support.requests import ask

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
EMPTY_SETTINGS = b"\0\0\0\x04\0\0\0\0\0"
_OCTETS_AT_ONCE = 16_000  # fewer than the largest frame that each peer must take


def open_socket(target: str, timeout_s: float = 10.0) -> socket.socket:
    """A TCP connection to HOST:PORT."""
    host, _, port = target.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=timeout_s)


def frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    """An HTTP/2 frame, right or wrong."""
    return len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body


def grpc_message(payload: bytes) -> bytes:
    """A message as gRPC frames it, uncompressed."""
    return b"\0" + len(payload).to_bytes(4, "big") + payload


class RawConnection:
    """One connection; `events` are all that the server has sent so far.

    `window`: the octets of each answer that it grants. Without `answers_pings` it sends nothing of its own accord.
    """

    def __init__(
        self,
        peer: str | socket.socket,
        *,
        window: int | None = None,
        answers_pings: bool = True,
        patience_s: float = 10.0,
    ) -> None:
        self.socket = open_socket(peer) if isinstance(peer, str) else peer
        self.socket.settimeout(patience_s)
        self.http2 = h2.connection.H2Connection(
            h2.config.H2Configuration(
                client_side=True,
                header_encoding=None,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        if window is not None:
            initial = {h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
            self.http2.local_settings = h2.settings.Settings(client=True, initial_values=initial)
        self.events: list[h2.events.Event] = []
        self.is_closed = False
        self.answers_pings = answers_pings
        self.http2.initiate_connection()
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def begin(
        self, method: str = "Generate", extra: Mapping[str, str | bytes] | None = None, *, path: str | None = None
    ) -> int:
        """A call's headers, not sent yet; `extra` come last, and replace. Its stream."""
        stream: int = self.http2.get_next_available_stream_id()
        headers: dict[str, str | bytes] = {
            ":method": "POST", ":path": path or f"/parley.v1.ChatService/{method}", ":scheme": "http",
            ":authority": "localhost", "te": "trailers", "content-type": "application/grpc",
        } | dict(extra or {})  # fmt: skip
        octets = [
            (name.encode(), value if isinstance(value, bytes) else value.encode()) for name, value in headers.items()
        ]
        self.http2.send_headers(stream, octets)
        return stream

    def send(self, data: bytes, stream: int = 1, *, ends: bool = True) -> None:
        """Octets of a call, as fast as the server takes them."""
        for start in range(0, max(len(data), 1), _OCTETS_AT_ONCE):
            part = data[start : start + _OCTETS_AT_ONCE]
            while self.http2.local_flow_control_window(stream) < len(part):
                self.flush()
                if not self.receive():
                    raise ConnectionResetError
            self.http2.send_data(stream, part, end_stream=ends and start + _OCTETS_AT_ONCE >= len(data))
        self.flush()

    def call(self, method: str, request: Message, extra: Mapping[str, str | bytes] | None = None) -> int:
        """Asks, and reads nothing. Its stream."""
        stream = self.begin(method, extra)
        self.send(grpc_message(request.SerializeToString()), stream)
        return stream

    def receive(self) -> list[h2.events.Event]:
        """What comes next; nothing at the end of the connection. Raises TimeoutError, and ProtocolError of h2."""
        try:
            data = self.socket.recv(65536)
        except ConnectionError:
            data = b""
        events: list[h2.events.Event] = self.http2.receive_data(data) if data else []
        self.events += events
        if self.answers_pings:
            self.flush()
        self.is_closed = not data
        return events

    def receive_for(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """All that comes in this time, or before `until` is true."""
        deadline = time.monotonic() + seconds
        while not self.is_closed and not until() and (left := deadline - time.monotonic()) > 0:
            self.socket.settimeout(left)
            try:
                self.receive()
            except TimeoutError:
                return

    def wait_closed(self, timeout_s: float) -> bool:
        """Whether the server closes the connection in this time; whatever it sends before is dropped."""
        deadline = time.monotonic() + timeout_s
        while not self.is_closed and (left := deadline - time.monotonic()) > 0:
            self.socket.settimeout(left)
            try:
                self.is_closed = not self.socket.recv(65536)
            except TimeoutError:
                break
            except ConnectionError:
                self.is_closed = True
        return self.is_closed

    def saw(self, kind: type[h2.events.Event]) -> bool:
        """Whether an event of this kind has come."""
        return any(isinstance(event, kind) for event in self.events)

    def trailers(self, stream: int = 1) -> dict[str, str] | None:
        """What ends the call; None where the server resets the stream, leaves, or refuses it as plain HTTP does.

        Raises TimeoutError if nothing comes for as long as its patience.
        """
        while True:
            try:
                for event in self.events:
                    if getattr(event, "stream_id", stream) != stream:
                        continue
                    headers = _text(getattr(event, "headers", None) or ())
                    if "grpc-status" in headers:
                        return headers
                    if headers.get(":status", "200") != "200":
                        return None
                    if isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated):
                        return None
                self.receive()
            except h2.exceptions.ProtocolError:
                return None
            if self.is_closed:
                return None

    def status(self, stream: int = 1) -> str | None:
        """The call's grpc-status; None as for `trailers`."""
        return (self.trailers(stream) or {}).get("grpc-status")

    def ping(self) -> None:
        self.http2.ping(b"12345678")
        self.flush()

    def flush(self) -> None:
        """Sends what is ready."""
        try:
            self.socket.sendall(self.http2.data_to_send())
        except ConnectionError:
            self.is_closed = True

    def close(self) -> None:
        self.socket.close()

    def reset(self) -> None:
        """Closes with a TCP reset, as a process does that dies with octets unread."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()


def begin_raw_stream(target: str, text: str, window: int | None = None) -> RawConnection:
    """A client that asks for a long stream and, the connection settled, does nothing more, not even answer pings."""
    connection = RawConnection(target, window=window)
    connection.call("GenerateStream", ask(text, max_new_tokens=4000))
    # A connection whose settings are never acknowledged is not kept for long, whatever else becomes of it.
    connection.receive_for(10, lambda: connection.saw(h2.events.RemoteSettingsChanged))
    connection.answers_pings = False
    return connection


def _text(headers: object) -> dict[str, str]:
    assert isinstance(headers, list | tuple)
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
