"""Credentials of a client: its TLS files, and the API key or token that each call carries."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable
from os import PathLike
from pathlib import Path

import grpc

ApiKey = str | Callable[[], str]
AnyPath = str | PathLike[str]

_LOCAL_TARGET = re.compile(
    r"(dns:/{0,3})?(localhost|127(\.\d+){3}|\[::1\]):\w+|ipv4:127(\.\d+){3}:\d+|ipv6:\[::1\]:\d+"
)
_KEY = re.compile("[!-~]+")
_UNIX_TARGET = re.compile(r"unix(-abstract)?:")
_PEM_CERTIFICATE = re.compile(b"-----BEGIN ((X509|TRUSTED) )?CERTIFICATE-----")
_PEM_KEY = re.compile(rb"-----BEGIN ((RSA|EC) )?PRIVATE KEY-----(?!\s*Proc-Type: 4,ENCRYPTED)")


class PlainTextKey(ValueError):
    """An API key would cross a network in plain text."""

    def __init__(
        self, target: str, way_out: str = "give credentials, such as tls_credentials(), or say insecure=True"
    ) -> None:
        super().__init__(f"an API key must not cross the network to {target} in plain text: {way_out}")


def tls_credentials(
    *,
    ca: AnyPath | None = None,
    cert: AnyPath | None = None,
    key: AnyPath | None = None,
) -> grpc.ChannelCredentials:
    """Channel credentials from PEM files, for the `credentials` of a client.

    Args:
        ca: the authorities that the server's certificate may come from; None: those that gRPC brings.
        cert: the client's own certificate and chain, for servers that demand one (mTLS).
        key: the private key of `cert`.

    Raises:
        OSError: a file cannot be read.
        ValueError: one of `cert` and `key` is missing, they do not belong together, or a file holds something else.
    """
    if (cert is None) != (key is None):
        raise ValueError("a certificate and its key belong together")
    authorities = _read_pem(ca, _PEM_CERTIFICATE, "certificate")
    chain = _read_pem(cert, _PEM_CERTIFICATE, "certificate")
    private_key = _read_pem(key, _PEM_KEY, "unencrypted private key")
    if cert is not None and key is not None:
        _check_pair(cert, key)
    return grpc.ssl_channel_credentials(authorities, private_key, chain)


def channel_credentials(
    target: str, credentials: grpc.ChannelCredentials | None, api_key: ApiKey | None, insecure: bool
) -> grpc.ChannelCredentials | None:
    """What the channel is made with; None is plain text.

    Raises:
        PlainTextKey: an API key would cross a network in plain text.
        TypeError, ValueError: it can be none.
    """
    if api_key is not None and not callable(api_key):
        authorization(api_key)
    if api_key is None or (insecure and credentials is None):
        return credentials
    if credentials is None:
        # Plain text, but gRPC sees to it that the other end is on this machine, whatever the target's name resolves to.
        credentials = grpc.local_channel_credentials(_local_connection_type(target))
    return grpc.composite_channel_credentials(credentials, grpc.metadata_call_credentials(_Bearer(api_key)))


def authorization(api_key: ApiKey) -> tuple[str, str]:
    """The metadata that carries an API key or token. Raises TypeError or ValueError for what can be none."""
    key = api_key() if callable(api_key) else api_key
    if not isinstance(key, str):
        raise TypeError(f"the API key must be text, not {type(key).__name__}")
    if not _KEY.fullmatch(key):
        raise ValueError("the API key is empty, or has blanks, line ends or letters beyond ASCII: no key has")
    return "authorization", f"Bearer {key}"


def is_local(target: str) -> bool:
    """Whether a target is on this machine by its very name."""
    return bool(_UNIX_TARGET.match(target) or _LOCAL_TARGET.fullmatch(target))


def _read_pem(path: AnyPath | None, kind: re.Pattern[bytes], name: str) -> bytes | None:
    """gRPC takes what it is given and fails only in the handshake, with an error that names no file."""
    if path is None:
        return None
    pem = Path(path).read_bytes()
    if not kind.search(pem):
        raise ValueError(f"{path} holds no {name} in PEM")
    return pem


def _check_pair(cert: AnyPath, key: AnyPath) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_cert_chain(cert, key, password=lambda: "")  # which it would ask the terminal for
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":  # of all else gRPC is the judge: this is another library
            raise ValueError(f"{key} is not the key of {cert}") from error


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
    raise PlainTextKey(target)
