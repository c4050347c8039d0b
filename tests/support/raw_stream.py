"""A stream on a raw HTTP/2 connection, for clients that behave as no library lets them."""

from __future__ import annotations

import socket

import h2.config
import h2.connection
import h2.settings

from tests.support.requests import ask


def begin_raw_stream(target: str, text: str, window: int | None = None) -> socket.socket:
    """A connection that asks for a stream and does nothing more. `window`: the octets of the answer that it grants."""
    host, port = target.split(":")
    raw = socket.create_connection((host, int(port)), timeout=10)
    connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    if window is not None:
        initial = {h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
        connection.local_settings = h2.settings.Settings(client=True, initial_values=initial)
    connection.initiate_connection()
    headers = [
        (":method", "POST"), (":path", "/parley.v1.ChatService/GenerateStream"), (":scheme", "http"),
        (":authority", target), ("te", "trailers"), ("content-type", "application/grpc"),
    ]  # fmt: skip
    connection.send_headers(1, headers)
    payload = ask(text, max_new_tokens=4000).SerializeToString()
    connection.send_data(1, b"\0" + len(payload).to_bytes(4, "big") + payload, end_stream=True)
    raw.sendall(connection.data_to_send())
    return raw
