"""Rules for clients without an API key: by what their certificate, token or address names, on real calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from parley.v1 import chat_pb2, chat_pb2_grpc
from parleyd.config import SecuritySettings
from parleyd.security.new_key import entry_for, new_key
from tests.integration.conftest import StartGateway
from tests.support import tokens
from tests.support.certificates import Authority
from tests.support.gateway import GatewayThread
from tests.support.requests import ask, reason_of

AUTHORITY = Authority()
ALLOWED, DENIED, LIMITED = None, "PERMISSION_DENIED", "QUEUE_FULL"


def write_rules(folder: Path, text: str) -> str:
    """Replaces the file at once."""
    (folder / "rules.new").write_text(text)
    (folder / "rules.new").rename(folder / "rules.toml")
    return str(folder / "rules.toml")


def outcome(call: Callable[[], Any]) -> str | None:
    """The reason of a refusal, None for an answer."""
    try:
        call()
    except grpc.RpcError as error:
        return reason_of(error)
    return None


class Clients:
    """Stubs for callers with certificates of their own."""

    def __init__(self, start_gateway: StartGateway, folder: Path, rules: str) -> None:
        cert, key = AUTHORITY.issue("server", ip="127.0.0.1").write(folder, "server")
        (folder / "ca.pem").write_bytes(AUTHORITY.cert)
        self._channels = ExitStack()
        security = SecuritySettings(
            tls_cert=cert, tls_key=key, tls_client_ca=str(folder / "ca.pem"), client_rules=write_rules(folder, rules)
        )
        self._gateway = start_gateway(security=security, credentials=self._credentials(common_name="probe"))

    def stub(self, **names: str) -> chat_pb2_grpc.ChatServiceStub:
        channel = self._gateway.connect(self._credentials(**names))
        return chat_pb2_grpc.ChatServiceStub(self._channels.enter_context(channel))

    def close(self) -> None:
        self._channels.close()

    @staticmethod
    def _credentials(common_name: str = "", uri: str = "") -> grpc.ChannelCredentials:
        shown = AUTHORITY.issue(common_name, uri=uri)
        return grpc.ssl_channel_credentials(AUTHORITY.cert, shown.key, shown.cert)


@pytest.fixture
def with_rules(start_gateway: StartGateway, tmp_path: Path) -> Iterator[Callable[[str], Clients]]:
    with ExitStack() as stack:

        def start(rules: str) -> Clients:
            clients = Clients(start_gateway, tmp_path, rules)
            stack.callback(clients.close)
            return clients

        yield start


def test_a_spiffe_id_has_rules_by_pattern_and_the_first_that_fits_holds(
    with_rules: Callable[[str], Clients],
) -> None:
    clients = with_rules("""
        [[client]]
        identity = "cert:spiffe://mesh.example/ns/chat/sa/front"
        priorities = true
        [[client]]
        identity = "cert:spiffe://mesh.example/ns/*/sa/counter"
        rpcs = ["CountTokens", "GetModel"]
        [[client]]
        identity = "cert:spiffe://mesh.example/ns/chat/*"
        requests_per_minute = 1
        [[client]]
        identity = "cert:*"
        rpcs = []
    """)
    front = clients.stub(uri="spiffe://mesh.example/ns/chat/sa/front")
    assert outcome(lambda: front.Generate(ask("Hi", priority=1), timeout=10)) is ALLOWED
    counter = clients.stub(uri="spiffe://mesh.example/ns/jobs/sa/counter")
    assert outcome(lambda: counter.GetModel(chat_pb2.GetModelRequest(), timeout=10)) is ALLOWED
    assert outcome(lambda: counter.Generate(ask("Hi"), timeout=10)) == DENIED
    for name in ("a", "b"):  # each identity that a pattern fits has the limit for itself
        other = clients.stub(uri=f"spiffe://mesh.example/ns/chat/sa/{name}")
        assert outcome(lambda: other.Generate(ask("Hi", priority=1), timeout=10)) == DENIED  # noqa: B023
        assert outcome(lambda: other.Generate(ask("Hi"), timeout=10)) == LIMITED  # noqa: B023
    stranger = clients.stub(common_name="spiffe://mesh.example.evil/ns/chat/sa/front")
    for rpc in chat_pb2.DESCRIPTOR.services_by_name["ChatService"].methods:
        method = getattr(stranger, rpc.name)
        request = rpc.input_type._concrete_class()
        assert outcome(lambda: list(method(request)) if rpc.server_streaming else method(request)) == DENIED  # noqa: B023


def bearer(credential: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {credential}"),)


@pytest.fixture
def with_tokens(start_gateway: StartGateway, tmp_path: Path) -> Callable[..., GatewayThread]:
    def start(rules: str, **security: Any) -> GatewayThread:
        (tmp_path / "jwks.json").write_text(tokens.key_set())
        settings = SecuritySettings(
            jwks=str(tmp_path / "jwks.json"),
            jwt_issuer=tokens.ISSUER,
            jwt_audience=tokens.AUDIENCE,
            client_rules=write_rules(tmp_path, rules),
            **security,
        )
        return start_gateway(max_running=2, security=settings)

    return start


ALICE = """
    [[client]]
    identity = "jwt:alice"
    rpcs = ["Generate", "GenerateStream"]
    priorities = true
    max_open_calls = 1
"""


def test_a_tokens_subject_has_rules(with_tokens: Callable[..., GatewayThread]) -> None:
    gateway = with_tokens(ALICE)
    alice, bob = bearer(tokens.token()), bearer(tokens.token(sub="bob"))
    generate, get_model = gateway.stub.Generate, gateway.stub.GetModel
    assert outcome(lambda: generate(ask("Hi", priority=1), metadata=alice)) is ALLOWED
    assert outcome(lambda: get_model(chat_pb2.GetModelRequest(), metadata=alice)) == DENIED
    assert outcome(lambda: generate(ask("Hi", priority=1), metadata=bob)) == DENIED
    assert outcome(lambda: get_model(chat_pb2.GetModelRequest(), metadata=bob)) is ALLOWED
    held = gateway.stub.GenerateStream(ask("!forever", max_new_tokens=4000), metadata=alice)
    next(held)
    assert outcome(lambda: generate(ask("Hi"), metadata=alice)) == LIMITED
    assert outcome(lambda: generate(ask("Hi"), metadata=bob)) is ALLOWED
    held.cancel()
    gateway.wait_idle()


def test_a_key_has_its_own_rules_and_no_token_takes_its_name(
    with_tokens: Callable[..., GatewayThread], tmp_path: Path
) -> None:
    key = new_key()
    (tmp_path / "keys.toml").write_text(entry_for("alice", key) + 'rpcs = ["GetModel"]\n')
    gateway = with_tokens(ALICE, api_keys=str(tmp_path / "keys.toml"))
    assert outcome(lambda: gateway.stub.GetModel(chat_pb2.GetModelRequest(), metadata=bearer(key))) is ALLOWED
    assert outcome(lambda: gateway.stub.Generate(ask("Hi"), metadata=bearer(key))) == DENIED
    token = bearer(tokens.token(sub="key:alice"))
    assert outcome(lambda: gateway.stub.Generate(ask("Hi"), metadata=token)) is ALLOWED  # it is jwt:key:alice


def test_allow_priorities_holds_for_keys_that_do_not_say(start_gateway: StartGateway, tmp_path: Path) -> None:
    silent, barred = new_key(), new_key()
    entries = (entry_for("silent", silent), entry_for("barred", barred), "priorities = false\n")
    (tmp_path / "keys.toml").write_text("".join(entries))
    settings = SecuritySettings(api_keys=str(tmp_path / "keys.toml"), allow_priorities=True)
    gateway = start_gateway(security=settings)
    assert outcome(lambda: gateway.stub.Generate(ask("Hi", priority=1), metadata=bearer(silent))) is ALLOWED
    assert outcome(lambda: gateway.stub.Generate(ask("Hi", priority=1), metadata=bearer(barred))) == DENIED


def test_addresses_have_rules_which_are_read_again(start_gateway: StartGateway, tmp_path: Path) -> None:
    rules = '[[client]]\nidentity = "ipv4:127.*"\nrpcs = ["GetModel"]\n'
    gateway = start_gateway(security=SecuritySettings(client_rules=write_rules(tmp_path, rules)))
    assert outcome(lambda: gateway.stub.GetModel(chat_pb2.GetModelRequest())) is ALLOWED
    assert outcome(lambda: gateway.stub.Generate(ask("Hi"))) == DENIED
    write_rules(tmp_path, rules.replace("127", "10"))
    deadline = time.monotonic() + 10
    while outcome(lambda: gateway.stub.Generate(ask("Hi"))) == DENIED:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_name_that_looks_like_a_spiffe_id_is_none_and_no_certificate_escapes_the_rules_for_all(
    with_rules: Callable[[str], Clients],
) -> None:
    front = "spiffe://mesh.example/ns/chat/sa/front"
    clients = with_rules(
        f'[[client]]\nidentity = "cert:{front}"\n[[client]]\nidentity = "cert:probe"\n'
        '[[client]]\nidentity = "cert:*"\nrpcs = []\n'
    )
    assert outcome(lambda: clients.stub(uri=front).Generate(ask("Hi"), timeout=10)) is ALLOWED
    assert outcome(lambda: clients.stub(common_name=front).Generate(ask("Hi"), timeout=10)) == DENIED
    assert outcome(lambda: clients.stub().Generate(ask("Hi"), timeout=10)) == DENIED


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this machine has no IPv6")
def test_an_ipv6_address_is_written_as_people_write_it(start_gateway: StartGateway, tmp_path: Path) -> None:
    rules = '[[client]]\nidentity = "ipv6:::1"\nrpcs = ["GetModel"]\n'
    security = SecuritySettings(client_rules=write_rules(tmp_path, rules))
    gateway = start_gateway(host="::1", security=security)
    assert outcome(lambda: gateway.stub.GetModel(chat_pb2.GetModelRequest())) is ALLOWED
    assert outcome(lambda: gateway.stub.Generate(ask("Hi"))) == DENIED
