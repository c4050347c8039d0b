"""A call with header bytes that no gRPC library would send."""

from __future__ import annotations

import socket

import h2.config
import h2.connection
import h2.events


def get_model(sock: socket.socket, authorization: bytes) -> bytes | None:
    """GetModel over a connected socket: its grpc-status, or None where the server broke off."""
    config = h2.config.H2Configuration(
        client_side=True, header_encoding=None, validate_outbound_headers=False, normalize_outbound_headers=False
    )
    connection = h2.connection.H2Connection(config)
    connection.initiate_connection()
    connection.send_headers(
        1,
        [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", b"/parley.v1.ChatService/GetModel"),
            (b":authority", b"localhost"),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            (b"authorization", authorization),
        ],
    )
    connection.send_data(1, b"\0\0\0\0\0", end_stream=True)
    sock.sendall(connection.data_to_send())
    while data := sock.recv(65536):
        for event in connection.receive_data(data):
            if isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated):
                return None
            headers = dict(getattr(event, "headers", None) or ())
            if b"grpc-status" in headers:
                return bytes(headers[b"grpc-status"])
        sock.sendall(connection.data_to_send())
    return None
