"""Credentials of a client: its TLS files, and the API key or token that each call carries."""

from __future__ import annotations

import re
from collections.abc import Callable
from os import PathLike
from pathlib import Path

import grpc

ApiKey = str | Callable[[], str]

_LOCAL_TARGET = re.compile(
    r"(dns:/{0,3})?(localhost|127(\.\d+){3}|\[::1\]):\w+|ipv4:127(\.\d+){3}:\d+|ipv6:\[::1\]:\d+"
)
_KEY = re.compile("[!-~]+")
_UNIX_TARGET = re.compile(r"unix(-abstract)?:")


def tls_credentials(
    *,
    ca: str | PathLike[str] | None = None,
    cert: str | PathLike[str] | None = None,
    key: str | PathLike[str] | None = None,
) -> grpc.ChannelCredentials:
    """Channel credentials from PEM files, for the `credentials` of a client.

    Args:
        ca: the authorities that the server's certificate may come from; None: those that gRPC brings.
        cert: the client's own certificate and chain, for servers that demand one (mTLS).
        key: the private key of `cert`.

    Raises:
        OSError: a file cannot be read.
        ValueError: one of `cert` and `key` is missing.
    """
    if (cert is None) != (key is None):
        raise ValueError("a certificate and its key belong together")
    authorities, chain, private_key = (None if path is None else Path(path).read_bytes() for path in (ca, cert, key))
    return grpc.ssl_channel_credentials(authorities, private_key, chain)


def channel_credentials(
    target: str, credentials: grpc.ChannelCredentials | None, api_key: ApiKey | None, insecure: bool
) -> grpc.ChannelCredentials | None:
    """What the channel is made with; None is plain text.

    Raises:
        ValueError: an API key would cross a network in plain text, or is none.
    """
    if isinstance(api_key, str) and not _KEY.fullmatch(api_key):
        raise ValueError("the API key is empty, or has blanks, line ends or letters beyond ASCII: no key has")
    if api_key is None or (insecure and credentials is None):
        return credentials
    if credentials is None:
        # Plain text, but gRPC sees to it that the other end is on this machine, whatever the target's name resolves to.
        credentials = grpc.local_channel_credentials(_local_connection_type(target))
    return grpc.composite_channel_credentials(credentials, grpc.metadata_call_credentials(_Bearer(api_key)))


def authorization(api_key: ApiKey) -> tuple[str, str]:
    """The metadata that carries an API key or token."""
    return "authorization", f"Bearer {api_key() if callable(api_key) else api_key}"


class _Bearer(grpc.AuthMetadataPlugin):
    """Asked by gRPC for each call, in a thread of its own."""

    def __init__(self, api_key: ApiKey) -> None:
        self._api_key = api_key

    def __call__(self, context: grpc.AuthMetadataContext, callback: grpc.AuthMetadataPluginCallback) -> None:
        callback((authorization(self._api_key),), None)


def _local_connection_type(target: str) -> grpc.LocalConnectionType:
    if _UNIX_TARGET.match(target):
        return grpc.LocalConnectionType.UDS
    if _LOCAL_TARGET.fullmatch(target):
        return grpc.LocalConnectionType.LOCAL_TCP
    raise ValueError(
        f"an API key must not cross the network to {target} in plain text: give credentials, such as "
        "tls_credentials(), or say insecure=True"
    )
