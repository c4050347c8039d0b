"""Options of the gRPC server. gRPC ignores misspelt names without a word, so each has a test that it takes effect."""

from __future__ import annotations

from parleyd.config import ServerSettings

# Calls that have arrived and that the event loop has not seen yet: some 20 KiB each.
_MAX_PENDING_CALLS = 10_000
# Of a call, until the event loop has seen it: who waits says for how long by a deadline.
_MAX_PENDING_SECONDS = 3600
# Of one connection, or strangers could open calls without end; each takes 20 KiB before its message is here.
_MAX_STREAMS = 4096
# Until a connection has shown its certificate and said that it speaks HTTP/2; gRPC's own default is two minutes.
_HANDSHAKE_TIMEOUT_MS = 20_000
# Until a connection has acknowledged our settings; before, gRPC holds it to none of them. Its default is a minute.
_SETTINGS_TIMEOUT_MS = 10_000


def server_options(settings: ServerSettings) -> list[tuple[str, int]]:
    """Channel arguments, as grpc/impl/channel_arg_names.h lists them."""
    return [
        # Else a second server could bind the same port and take half of the connections.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.keepalive_time_ms", round(settings.keepalive_time * 1000)),
        # Not grpc.keepalive_timeout_ms: measured on grpcio 1.85, that one alone closes nothing; this one does.
        ("grpc.http2.ping_timeout_ms", round(settings.keepalive_timeout * 1000)),
        # Clients may ping as they like, also between calls. By default a few pings count as abuse, and the GOAWAY that
        # follows kills every RPC of the channel.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 1000),
        ("grpc.http2.max_ping_strikes", 0),
        # By default gRPC cancels some calls of a burst as soon as 1,000 pend, with no word of why; ours are refused.
        ("grpc.server.max_pending_requests", _MAX_PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", 2 * _MAX_PENDING_CALLS),
        # By default it also cancels what has pended for 30 seconds, as some of 10,000 calls at once do on busy cores.
        ("grpc.server_max_unrequested_time_in_server", _MAX_PENDING_SECONDS),
        ("grpc.max_concurrent_streams", _MAX_STREAMS),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_TIMEOUT_MS),
        ("grpc.http2.settings_timeout", _SETTINGS_TIMEOUT_MS),
    ]
