"""Who calls, and what they may do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import unquote

import grpc

_MAX_NAME_CHARS = 256
# In this order. gRPC names a SPIFFE id only where it is the certificate's one URI, as SPIFFE demands.
_SPIFFE_ID = "peer_spiffe_id"
_CERTIFICATE_NAMES = (_SPIFFE_ID, "peer_dns", "x509_common_name")
# What names others than DNS names and common names do: workloads, and clients whose certificates have no name.
_OTHERS_NAMES = ("spiffe:", "ipv4:", "ipv6:")


@dataclass(frozen=True)
class Rules:
    """What a caller may do. `rpcs`: names of ChatService's methods; None is all, as None is no limit."""

    rpcs: frozenset[str] | None = None
    priorities: bool = False
    max_open_calls: int | None = None
    requests_per_minute: int | None = None


@dataclass(frozen=True)
class Caller:
    """An identity, such as `key:billing`, and its rules. Limits are kept and logs written by identity."""

    identity: str
    rules: Rules


def identity(kind: str, name: object) -> str | None:
    """KIND:NAME, or None for what must not stand in a log line."""
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME_CHARS or not name.isprintable():
        return None
    return f"{kind}:{name}"


def certificate_identity(auth_context: Mapping[str, Iterable[bytes]]) -> str | None:
    """The identity in a verified client certificate: its SPIFFE id, else a DNS name, else its common name."""
    for source in _CERTIFICATE_NAMES:
        for value in auth_context.get(source, ()):
            name = value.decode(errors="replace")
            # Authorities that check URIs may let whoever asks choose a common name.
            is_forged = source != _SPIFFE_ID and name.lower().startswith(_OTHERS_NAMES)
            if not is_forged and (found := identity("cert", name)):
                return found
    return None


def address_identity(context: grpc.aio.ServicerContext[object, object]) -> str:
    """The peer's address without its port, such as `ipv4:10.0.0.7` or `ipv6:2001:db8::7`."""
    kind, _, address = context.peer().rpartition(":")[0].partition(":")
    return f"{kind}:{unquote(address).strip('[]')}"  # gRPC writes ipv6:%5B2001:db8::7%5D:PORT
