"""A gateway that asks for a client's certificate and for an API key, and the files that a client shows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from parleyd.config import SecuritySettings
from parleyd.security.new_key import entry_for, new_key
from tests.support.certificates import Authority
from tests.support.gateway import GatewayThread, scripted_command, scripted_settings
from tests.support.tiny_tokenizer import write_tiny_tokenizer


@dataclass(frozen=True)
class SecuredGateway:
    """`target` is its address; the rest are paths of PEM files, and of one that holds the key."""

    target: str
    ca: str
    cert: str
    key: str
    api_key: str


@contextmanager
def secured_gateway(folder: Path) -> Iterator[SecuredGateway]:
    """Runs one with a scripted worker; all its files are in `folder`."""
    authority, api_key = Authority(), new_key()
    server = authority.issue("server", dns=("localhost",), ip="127.0.0.1")
    client = authority.issue("client")
    server_cert, server_key = server.write(folder, "server")
    cert, key = client.write(folder, "client")
    ca, keys, api_key_file = (folder / name for name in ("ca.pem", "keys.toml", "api-key"))
    ca.write_bytes(authority.cert)
    keys.write_text(entry_for("client", api_key))
    api_key_file.write_text(api_key + "\n")
    security = SecuritySettings(tls_cert=server_cert, tls_key=server_key, tls_client_ca=str(ca), api_keys=str(keys))
    command = scripted_command(write_tiny_tokenizer(folder / "tokenizer"))
    credentials = grpc.ssl_channel_credentials(authority.cert, client.key, client.cert)
    with GatewayThread(scripted_settings(security=security), command, credentials=credentials) as gateway:
        yield SecuredGateway(gateway.target, str(ca), cert, key, str(api_key_file))
