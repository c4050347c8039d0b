"""How the clients connect: channel options and the service config with its retries."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from parley_client.credentials import ApiKey, authorization, is_local
from parley_client.errors import Unauthenticated
from parley_client.patience import Contact, Patience, time_limit

MAX_ATTEMPTS_LIMIT = 5  # gRPC itself makes no more
DEFAULT_MAX_RESUMES = 8  # over some 16 s: longer than a server takes to come back
DEFAULT_TARGET = "localhost:50051"
_MAX_PORT = 65_535  # gRPC would leave out the higher bits of a larger number
# Without a port gRPC would try that of HTTPS, and take what else begins like a URL for a host's name.
_TARGET = re.compile(
    r"(?P<portless>unix:(?!//[^/])\S+|(unix-abstract|vsock):\S+)|dns:\S*[^\s/]|ipv[46]:\S+:\d+|(xds|google-c2p):\S+"
    r"|([^\s:/,\[\]]+|\[[^\s/,\[\]]+\]):\w+"
)
_PORT = re.compile(r":(\d+)(?=,|$)")
_METADATA_KEY = re.compile("[a-z0-9_.-]+")
_METADATA_VALUE = re.compile("[ -~]*")


def check_target(target: str) -> None:
    """Raises ValueError for a target that gRPC would take for something else than what was meant."""
    match = _TARGET.fullmatch(target)
    ports = [] if match and match["portless"] else _PORT.findall(target)
    if not match or not target.isprintable() or any(int(port) > _MAX_PORT for port in ports):
        raise ValueError(
            f"{target!r} is no HOST:PORT, such as {DEFAULT_TARGET} or [::1]:50051, nor another target of gRPC's, such "
            "as dns:///HOST:PORT or unix:/PATH"
        )


def channel_options(
    target: str, max_attempts: int, methods: Collection[str] | None = None
) -> list[tuple[str, str | int]]:
    """Options of a channel to `target`, on which a call is tried `max_attempts` times (1 to 5; 1 is no retry).

    `methods`: those of the chat service that gRPC tries again; None is all.

    Raises:
        ValueError: `max_attempts` is out of range.
    """
    if not 1 <= max_attempts <= MAX_ATTEMPTS_LIMIT:
        raise ValueError(f"max_attempts must be 1 to {MAX_ATTEMPTS_LIMIT}, not {max_attempts}")
    return [
        # Log-probabilities of a long answer pass gRPC's default of 4 MiB.
        ("grpc.max_receive_message_length", -1),
        # A connection that died without a word (a pulled cable, a forgetful NAT) is noticed within 40 s, also while a
        # long prompt keeps the stream silent. Idle connections are not pinged: servers count that as abuse.
        ("grpc.keepalive_time_ms", 30_000),
        # Not grpc.keepalive_timeout_ms: with grpcio 1.85 that one alone changes nothing, and it takes 90 s.
        ("grpc.http2.ping_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        # The default backs off up to two minutes, far longer than a server takes to come back.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5_000),
        # Else a client would share its connections, and its waits between tries, with every other of the process, and
        # even with one that is closed but not yet collected: its calls would fail though the server is back.
        ("grpc.use_local_subchannel_pool", 1),
        # The proxy that $http_proxy names cannot know what this machine calls localhost.
        ("grpc.enable_http_proxy", int(not is_local(target))),
        ("grpc.enable_retries", int(max_attempts > 1)),
        ("grpc.service_config", service_config(max_attempts, methods)),
    ]


def service_config(max_attempts: int, methods: Collection[str] | None = None) -> str:
    """The gRPC service config, as JSON: calls take turns among a target's addresses; which are tried again, and when.

    gRPC tries again only until the answer's headers arrive, and a Parley server sends these with the first message: so
    no part of an answer is ever seen twice. The throttle stops retries once more than about a third of all calls fail
    for a while, so that they do not add load to a server in trouble; it lets what a replica takes with it be tried
    again, up to some 500 calls at once.
    """
    config: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if max_attempts == 1:
        return json.dumps(config)
    retry_policy = {
        "maxAttempts": max_attempts,
        "initialBackoff": "0.1s",
        "maxBackoff": "2s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    # Not the health service: its answer is about now.
    service = {"service": "parley.v1.ChatService"}
    names = [service] if methods is None else [service | {"method": method} for method in methods]
    config["methodConfig"] = [{"name": names, "retryPolicy": retry_policy}]
    config["retryThrottling"] = {"maxTokens": 1000, "tokenRatio": 0.5}
    return json.dumps(config)


@dataclass(frozen=True)
class CallDefaults:
    """What each call of a client carries: its timeout in seconds (None: no limit) and metadata; and how often in a row
    one that failed is made again."""

    timeout: float | None
    metadata: tuple[tuple[str, str], ...]
    max_resumes: int
    api_key: ApiKey | None  # where the channel's credentials do not carry it
    contact: Contact

    @classmethod
    def create(
        cls, timeout: float | None, metadata: Mapping[str, str] | None, max_resumes: int, api_key: ApiKey | None
    ) -> CallDefaults:
        """Defaults from the arguments of a client.

        Raises:
            TypeError: `metadata` is no mapping.
            ValueError: `max_resumes` is negative, `timeout` no number, or `metadata` cannot be sent.
        """
        time_limit(timeout)
        if max_resumes < 0:
            raise ValueError(f"max_resumes must be 0 or more, not {max_resumes}")
        return cls(timeout, _lowered(metadata or {}), max_resumes, api_key, Contact())

    def args(self, timeout: float | None) -> dict[str, Any]:
        """Keyword arguments of a gRPC call that may take `timeout` seconds (None: the client's own).

        Raises:
            Unauthenticated: the function that gives the API key failed.
        """
        limit = time_limit(self.timeout if timeout is None else timeout)
        metadata = self.metadata if self.api_key is None else (*self.metadata, _asked_for(self.api_key))
        return {"timeout": None if limit == math.inf else limit, "metadata": metadata}

    def patience(self, timeout: float | None, num_retries: int = 0, is_resumed: bool = True) -> Patience:
        """For a call that may take `timeout` seconds (None: the client's own), tries and pauses together.

        `num_retries`: see Patience. `is_resumed`: whether it is made again up to `max_resumes` times after these.
        """
        limit = self.timeout if timeout is None else timeout
        return Patience(self.args, limit, self.max_resumes if is_resumed else 0, self.contact, num_retries)


def _asked_for(api_key: ApiKey) -> tuple[str, str]:
    try:
        return authorization(api_key)
    except Exception as error:  # as status.py has it where gRPC asks
        raise Unauthenticated(f"no credentials: {error}") from error


def _lowered(metadata: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """As gRPC wants it. What it cannot send would fail each call, blocking or not in other ways, and untyped."""
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata must be a dict, not {type(metadata).__name__}")
    for key, value in metadata.items():
        if not isinstance(key, str) or not _METADATA_KEY.fullmatch(key.lower()):
            raise ValueError(f"metadata: {key!r} is no key: letters, digits, '_', '-' and '.' make one")
        if key.lower().endswith("-bin"):
            if not isinstance(value, bytes):
                raise ValueError(f"metadata[{key!r}] must be bytes, as the key ends in -bin")
        elif not isinstance(value, str) or not _METADATA_VALUE.fullmatch(value):
            raise ValueError(f"metadata[{key!r}] is no text in printable ASCII")
    return tuple((key.lower(), value) for key, value in metadata.items())
