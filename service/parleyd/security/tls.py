"""The server's certificate and the authorities of its clients, read from PEM files and checked before use.

gRPC takes what it is given and fails only in the handshake, with a line that names no file.
"""

from __future__ import annotations

import datetime
import logging
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from parleyd.config import SecuritySettings
from parleyd.errors import StartupError
from parleyd.security.watched import Watched, read_file

_logger = logging.getLogger("parleyd.security")

_CURVES = ("secp256r1", "secp384r1", "secp521r1")  # gRPC's, which drops a new certificate on another without a word
_REFUSED_BY_CLIENTS = "secp521r1"  # by those on gRPC's core, such as Python's; those on OpenSSL take it


class Certificates:
    """Credentials of a server whose certificate can be replaced: new connections get the files' content as it is."""

    def __init__(self, settings: SecuritySettings) -> None:
        paths = [path for path in (settings.tls_cert, settings.tls_key, settings.tls_client_ca) if path]
        self._files = Watched(paths, lambda: _read(settings))
        self._fresh: grpc.ServerCertificateConfiguration | None = None
        self._demands_certificates = settings.tls_client_ca is not None

    def server_credentials(self) -> grpc.ServerCredentials:
        """For `add_secure_port`. TLS 1.2 and later, which is gRPC's own minimum."""
        fetch: Any = self._take_fresh  # the stubs do not know that it may return None
        return grpc.dynamic_ssl_server_credentials(self._files.value, fetch, self._demands_certificates)

    def refresh(self) -> None:
        """Reads changed files; connections that are open stay as they are."""
        if self._files.refresh():
            self._fresh = self._files.value

    def _take_fresh(self) -> grpc.ServerCertificateConfiguration | None:
        """gRPC asks before each handshake, in a thread of its own; None keeps what it has."""
        fresh, self._fresh = self._fresh, None
        return fresh


def _read(settings: SecuritySettings) -> grpc.ServerCertificateConfiguration:
    assert settings.tls_cert and settings.tls_key
    chain, key = read_file("--tls-cert", settings.tls_cert), read_file("--tls-key", settings.tls_key)
    certificate = _parse_certificates("--tls-cert", settings.tls_cert, chain)[0]
    own_key = _parse_key(settings.tls_key, key)
    if _public_bytes(own_key.public_key()) != _public_bytes(certificate.public_key()):
        raise StartupError(f"--tls-key {settings.tls_key} is not the key of --tls-cert {settings.tls_cert}")
    if isinstance(own_key, ec.EllipticCurvePrivateKey) and own_key.curve.name == _REFUSED_BY_CLIENTS:
        _logger.warning(
            "--tls-key %s is on the curve %s: clients in Python, C++ and others on gRPC's core cannot connect",
            settings.tls_key,
            own_key.curve.name,
        )
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not begin <= datetime.datetime.now(datetime.UTC) <= end:
        _logger.warning("--tls-cert %s is valid from %s to %s, not now", settings.tls_cert, begin, end)
    authorities = None
    if settings.tls_client_ca:
        authorities = read_file("--tls-client-ca", settings.tls_client_ca)
        _parse_certificates("--tls-client-ca", settings.tls_client_ca, authorities)
    return grpc.ssl_server_certificate_configuration([(key, chain)], authorities)


def _parse_certificates(flag: str, path: str, pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise StartupError(f"{flag} {path} holds no certificate in PEM that can be read") from error


def _parse_key(path: str, pem: bytes) -> rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except TypeError as error:
        raise StartupError(f"--tls-key {path} is encrypted; give the key in plain PEM") from error
    except Exception as error:  # ValueError, UnsupportedAlgorithm: whatever is in the file, it is no key for us
        raise StartupError(f"--tls-key {path} holds no private key in PEM that can be read") from error
    if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
        raise StartupError(f"--tls-key {path} is neither an RSA nor an elliptic-curve key")
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name not in _CURVES:
        raise StartupError(f"--tls-key {path} is on the curve {key.curve.name}; gRPC knows {', '.join(_CURVES)}")
    return key


def _public_bytes(key: object) -> bytes:
    if not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
        return b""
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
