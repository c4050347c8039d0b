"""TLS and mTLS with real certificates: who gets in, who does not, and certificates that change under open streams."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from parley.v1 import chat_pb2, chat_pb2_grpc
from parleyd.config import SecuritySettings
from parleyd.gateway.supervisor import State
from parleyd.telemetry.logging import _RequestFilter
from tests.integration.conftest import StartGateway
from tests.support.certificates import Authority, Certificate
from tests.support.eventually import eventually
from tests.support.gateway import GatewayThread
from tests.support.raw_http2 import open_socket
from tests.support.requests import ask

AUTHORITY = Authority()
STRANGER = Authority("Another CA")
CLIENT = AUTHORITY.issue("client", uri="spiffe://mesh.example/ns/chat/sa/client")


def server_certificate(authority: Authority = AUTHORITY, name: str = "server", **fields: object) -> Certificate:
    return authority.issue(name, dns=("localhost",), ip="127.0.0.1", **fields)  # type: ignore[arg-type]


def settings_in(folder: Path, *, mutual: bool) -> SecuritySettings:
    cert, key = server_certificate().write(folder, "server")
    (folder / "ca.pem").write_bytes(AUTHORITY.cert)
    return SecuritySettings(tls_cert=cert, tls_key=key, tls_client_ca=str(folder / "ca.pem") if mutual else None)


def credentials(shown: Certificate | None = CLIENT, trusted: Authority = AUTHORITY) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(trusted.cert, shown and shown.key, shown and shown.cert)


@pytest.fixture
def start(start_gateway: StartGateway, tmp_path: Path) -> Callable[..., GatewayThread]:
    def start(*, mutual: bool = True) -> GatewayThread:
        return start_gateway(security=settings_in(tmp_path, mutual=mutual), credentials=credentials())

    return start


def can_call(gateway: GatewayThread, with_credentials: grpc.ChannelCredentials | None) -> bool:
    with gateway.connect(with_credentials) as channel:
        try:
            chat_pb2_grpc.ChatServiceStub(channel).GetModel(chat_pb2.GetModelRequest(), timeout=10)
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            return False
        return True


def test_a_server_with_tls_answers_tls_alone(start: Callable[..., GatewayThread]) -> None:
    gateway = start(mutual=False)
    assert can_call(gateway, credentials(None))
    assert not can_call(gateway, None)
    assert not can_call(gateway, credentials(None, trusted=STRANGER))


def test_with_a_client_ca_only_its_clients_get_in(start: Callable[..., GatewayThread]) -> None:
    gateway = start()
    assert can_call(gateway, credentials(CLIENT))
    assert not can_call(gateway, credentials(None))
    assert not can_call(gateway, credentials(STRANGER.issue("client")))
    assert not can_call(gateway, credentials(AUTHORITY.issue("client", days=-1)))
    assert not can_call(gateway, credentials(Certificate(CLIENT.cert, AUTHORITY.issue("client").key)))


def test_the_certificate_names_the_caller_in_the_log(
    start: Callable[..., GatewayThread], caplog: pytest.LogCaptureFixture
) -> None:
    gateway = start()
    caplog.handler.addFilter(_RequestFilter())
    with caplog.at_level(logging.INFO, "parleyd.rpc"):
        gateway.stub.Generate(ask("Hi"), timeout=10)
        gateway.wait_idle()
    assert "cert:spiffe://mesh.example/ns/chat/sa/client]" in vars(caplog.records[-1])["request"]


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_tls_before_1_2_is_refused_by_the_server(start: Callable[..., GatewayThread], version: ssl.TLSVersion) -> None:
    gateway = start(mutual=False)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    with open_socket(gateway.target) as plain:
        if version is ssl.TLSVersion.TLSv1_2:
            context.wrap_socket(plain).close()
            return
        with pytest.raises(ssl.SSLError) as refused:
            context.wrap_socket(plain)
        assert refused.value.reason == "UNEXPECTED_EOF_WHILE_READING"  # hung up on, not this client's own refusal


@pytest.mark.parametrize(
    ("curve", "suits_grpc"), [(ec.SECP256R1(), True), (ec.SECP384R1(), True), (ec.SECP521R1(), False)]
)
def test_the_log_tells_of_a_certificate_that_python_clients_refuse(
    start_gateway: StartGateway,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    curve: ec.EllipticCurve,
    suits_grpc: bool,
) -> None:
    settings = settings_in(tmp_path, mutual=False)
    server_certificate(name="another", curve=curve).write(tmp_path, "server")
    gateway = start_gateway(security=settings, credentials=credentials(), wait_ready=suits_grpc)
    eventually(lambda: gateway.gateway.supervisor.state is State.READY)  # until then, who gets in is refused too
    assert served_name(gateway) == "another"
    assert can_call(gateway, credentials(None)) == suits_grpc
    assert ("is on the curve" in caplog.text) == (not suits_grpc)


def test_authorities_may_have_keys_that_clients_may_not(start_gateway: StartGateway, tmp_path: Path) -> None:
    authority = Authority(curve=ec.SECP521R1())
    settings = settings_in(tmp_path, mutual=True)
    (tmp_path / "ca.pem").write_bytes(authority.cert)
    server_certificate(authority).write(tmp_path, "server")
    shown = credentials(authority.issue("client"), trusted=authority)
    gateway = start_gateway(security=settings, credentials=shown)
    assert can_call(gateway, shown)
    assert not can_call(gateway, credentials(authority.issue("client", curve=ec.SECP521R1()), trusted=authority))


def served_name(gateway: GatewayThread) -> str:
    """The common name of the certificate that a new connection is shown."""
    host, port = gateway.target.split(":")
    pem = ssl.get_server_certificate((host, int(port)), timeout=10)
    (name,) = x509.load_pem_x509_certificate(pem.encode()).subject
    return str(name.value)


def test_a_new_certificate_is_served_while_streams_go_on(start: Callable[..., GatewayThread], tmp_path: Path) -> None:
    gateway = start(mutual=False)
    stream = gateway.stub.GenerateStream(ask("!forever", max_new_tokens=4000), timeout=60)
    next(stream)
    server_certificate(name="renewed").write(tmp_path, "server")
    eventually(lambda: served_name(gateway) == "renewed")
    for _ in range(3):
        next(stream)
    assert can_call(gateway, credentials(None))
    stream.cancel()
    gateway.wait_idle()


def test_a_broken_new_certificate_is_logged_and_the_old_one_stays(
    start: Callable[..., GatewayThread], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = start()
    whole = (tmp_path / "server.pem").read_bytes()
    (tmp_path / "server.pem").write_bytes(whole[:100])
    eventually(lambda: "server.pem holds no certificate" in caplog.text)
    assert "what was read before stays in use" in caplog.text
    assert can_call(gateway, credentials(CLIENT))
    # A key without its certificate is what a renewal looks like from inside.
    renewed = server_certificate(name="renewed")
    (tmp_path / "server.pem").write_bytes(whole)
    (tmp_path / "server.key").write_bytes(renewed.key)
    eventually(lambda: "is not the key of --tls-cert" in caplog.text)
    assert can_call(gateway, credentials(CLIENT))
    (tmp_path / "server.pem").write_bytes(renewed.cert)
    eventually(lambda: served_name_with(gateway, CLIENT, tmp_path) == "renewed")


def served_name_with(gateway: GatewayThread, shown: Certificate, folder: Path) -> str:
    context = ssl.create_default_context(cadata=AUTHORITY.cert.decode())
    context.load_cert_chain(*shown.write(folder, "shown"))
    with (
        open_socket(gateway.target) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        subject = (secured.getpeercert() or {})["subject"]
    return str(dict(part for parts in subject for part in parts)["commonName"])  # type: ignore[misc]


def test_a_new_client_ca_shuts_out_the_old_ones_clients(start: Callable[..., GatewayThread], tmp_path: Path) -> None:
    gateway = start()
    stream = gateway.stub.GenerateStream(ask("!forever", max_new_tokens=4000), timeout=60)
    next(stream)
    (tmp_path / "ca.pem").write_bytes(STRANGER.cert)
    eventually(lambda: can_call(gateway, credentials(STRANGER.issue("client"))))
    assert not can_call(gateway, credentials(CLIENT))
    next(stream)
    stream.cancel()
    gateway.wait_idle()
