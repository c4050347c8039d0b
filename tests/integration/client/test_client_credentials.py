"""The Python clients with TLS, certificates, API keys and tokens, against the real gateway with real certificates."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parley_client import Client, ConnectionFailed, PermissionDenied, QueueFull, Unauthenticated, tls_credentials, user
from parley_client.cli import main
from parley_client.credentials import channel_credentials
from parleyd.config import SecuritySettings
from parleyd.security.new_key import entry_for, new_key
from tests.integration.conftest import StartGateway
from tests.support.certificates import Authority
from tests.support.gateway import GatewayThread

KEY, LIMITED = new_key(), new_key()
AUTHORITY = Authority()

Connect = Callable[..., Any]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """The paths of what a client needs for mTLS."""
    (tmp_path / "ca.pem").write_bytes(AUTHORITY.cert)
    cert, key = AUTHORITY.issue("client").write(tmp_path, "client")
    return {"ca": str(tmp_path / "ca.pem"), "cert": cert, "key": key}


@pytest.fixture
def keys(tmp_path: Path) -> str:
    path = tmp_path / "keys.toml"
    path.write_text(entry_for("a", KEY) + entry_for("b", LIMITED) + "requests_per_minute = 1\n")
    return str(path)


@pytest.fixture
def mutual(start_gateway: StartGateway, tmp_path: Path, files: dict[str, str], keys: str) -> GatewayThread:
    """A gateway that demands certificate and key."""
    cert, key = AUTHORITY.issue("server", dns=("localhost",), ip="127.0.0.1").write(tmp_path, "server")
    security = SecuritySettings(tls_cert=cert, tls_key=key, tls_client_ca=files["ca"], api_keys=keys)
    return start_gateway(security=security, credentials=tls_credentials(**files))


def test_certificate_and_key_let_a_client_in(connect: Connect, mutual: GatewayThread, files: dict[str, str]) -> None:
    credentials = tls_credentials(**files)
    with connect(mutual.target, credentials=credentials, api_key=KEY) as client:
        assert client.chat([user("Hi")]).content == "Hi"
        stream = client.stream([user("Hi again")])
        assert "".join(map(str, stream)) == "Hi again"
        client.wait_until_ready(timeout=10)
    with connect(mutual.target, credentials=credentials) as client, pytest.raises(Unauthenticated):
        client.chat([user("Hi")])
    with connect(mutual.target, credentials=credentials, api_key=new_key()) as client, pytest.raises(Unauthenticated):
        client.chat([user("Hi")])


def test_without_the_right_certificate_there_is_no_connection(
    connect: Connect, mutual: GatewayThread, files: dict[str, str], tmp_path: Path
) -> None:
    stranger = Authority("Another CA")
    cert, key = stranger.issue("client").write(tmp_path, "stranger")
    (tmp_path / "stranger-ca.pem").write_bytes(stranger.cert)
    for wrong in (
        tls_credentials(ca=files["ca"]),
        tls_credentials(ca=files["ca"], cert=cert, key=key),
        tls_credentials(ca=tmp_path / "stranger-ca.pem", cert=files["cert"], key=files["key"]),
    ):
        with (
            connect(mutual.target, credentials=wrong, api_key=KEY, max_attempts=1) as client,
            pytest.raises(ConnectionFailed),
        ):
            client.chat([user("Hi")], timeout=10)


def test_errors_of_keys_are_typed(connect: Connect, start_gateway: StartGateway, keys: str) -> None:
    gateway = start_gateway(security=SecuritySettings(api_keys=keys))
    with connect(gateway.target, api_key=KEY) as client, pytest.raises(PermissionDenied):
        client.chat([user("Hi")], priority=1)
    with connect(gateway.target, api_key=LIMITED) as client:
        client.chat([user("Hi")])
        with pytest.raises(QueueFull) as refused:
            client.chat([user("Hi")])
        assert 0 < refused.value.retry_after_s <= 60


@pytest.mark.parametrize("insecure", [False, True])
def test_a_function_is_asked_for_the_key_before_each_call(
    connect: Connect, start_gateway: StartGateway, keys: str, insecure: bool
) -> None:
    gateway = start_gateway(security=SecuritySettings(api_keys=keys))
    given = iter([KEY, "wrong", KEY])
    with connect(gateway.target, api_key=lambda: next(given), insecure=insecure) as client:
        client.chat([user("Hi")])
        with pytest.raises(Unauthenticated):
            client.chat([user("Hi")])
        assert "".join(map(str, client.stream([user("Hi")]))) == "Hi"


@pytest.mark.parametrize("insecure", [False, True])
@pytest.mark.parametrize(
    ("api_key", "said"),
    [(lambda: str(int("no number")), "invalid literal"), (lambda: "two words", "the API key is empty, or")],
    ids=["raises", "no key"],
)
def test_a_function_that_gives_no_key_is_told_as_such(
    connect: Connect, start_gateway: StartGateway, api_key: Callable[[], str], said: str, insecure: bool
) -> None:
    with (
        connect(start_gateway().target, api_key=api_key, insecure=insecure, max_attempts=1) as client,
        pytest.raises(Unauthenticated, match=said),
    ):
        client.chat([user("Hi")])


@pytest.mark.parametrize(
    "target",
    ["parley.example:50051", "10.0.0.1:50051", "dns:///parley:1", "ipv4:127.0.0.1:1,10.0.0.1:1", "localhost.x:1"],
)
def test_a_key_does_not_cross_a_network_in_plain_text(connect: Connect, target: str) -> None:
    with pytest.raises(ValueError, match="must not cross the network"):
        connect(target, api_key=KEY)
    with connect(target, api_key=KEY, insecure=True):
        pass
    assert channel_credentials(target, None, None, insecure=False) is None


@pytest.mark.parametrize("target", ["localhost:1", "127.0.0.1:1", "[::1]:1", "dns:///localhost:1", "unix:/tmp/x"])
def test_a_key_may_go_to_this_machine(target: str) -> None:
    assert channel_credentials(target, None, KEY, insecure=False) is not None


@pytest.mark.parametrize("key", ["", "two words", "two\nlines", "…"])
def test_what_can_be_no_key_is_refused_before_anything_is_sent(key: str) -> None:
    with pytest.raises(ValueError, match="the API key is empty, or has"):
        Client("localhost:50051", api_key=key)


def test_certificate_and_key_belong_together(files: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="belong together"):
        tls_credentials(cert=files["cert"])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"ca": "key"}, "client.key holds no certificate in PEM"),
        ({"cert": "key"}, "client.key holds no certificate in PEM"),
        ({"key": "cert"}, "client.pem holds no unencrypted private key in PEM"),
        ({"key": "encrypted"}, "encrypted.key holds no unencrypted private key in PEM"),
        ({"key": "other"}, "other.key is not the key of .*client.pem"),
    ],
)
def test_a_file_that_holds_something_else_is_named(
    files: dict[str, str], tmp_path: Path, wrong: dict[str, str], said: str
) -> None:
    _, other = AUTHORITY.issue("other").write(tmp_path, "other")
    encrypted = tmp_path / "encrypted.key"
    encrypted.write_text("-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n")
    given = {name: {**files, "other": other, "encrypted": str(encrypted)}[wrong.get(name, name)] for name in files}
    with pytest.raises(ValueError, match=said):
        tls_credentials(**given)


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["--tls"], "give the authority of the server's certificate with --tls-ca"),
        (["--tls-ca", "ca"], "the server may want a certificate: --client-cert and --client-key"),
        (
            ["--tls-ca", "ca", "--client-cert", "old", "--client-key", "old key"],
            "the server may want another certificate than that of --client-cert and --client-key",
        ),
        ([], "does a server listen at 127.0.0.1:PORT, in plain text? --target names another"),
    ],
)
def test_the_command_line_tells_which_tls_flag_may_help(
    mutual: GatewayThread, files: dict[str, str], tmp_path: Path, flags: list[str], hint: str
) -> None:
    files["old"], files["old key"] = AUTHORITY.issue("client", days=-1).write(tmp_path, "old")
    error = _failure_of_health(mutual.target, *(files.get(flag, flag) for flag in flags))
    assert error.endswith(f" ({hint.replace('PORT', mutual.target.rpartition(':')[2])})")


def test_the_command_line_tells_of_a_servers_certificate_that_has_expired(
    start_gateway: StartGateway, files: dict[str, str], tmp_path: Path
) -> None:
    cert, key = AUTHORITY.issue("server", ip="127.0.0.1", days=-1).write(tmp_path, "server")
    target = start_gateway(security=SecuritySettings(tls_cert=cert, tls_key=key), wait_ready=False).target
    error = _failure_of_health(target, "--tls-ca", files["ca"])
    assert error.endswith(" (that is the server's certificate, by this machine's clock)")


def _failure_of_health(target: str, *flags: str) -> str:
    command = [Path(sys.executable).parent / "parley", "health", "--target", target, *flags]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GRPC_", "PARLEY_"))}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    (line,) = result.stderr.splitlines()  # and none of gRPC's own of the handshake
    return line


def test_the_command_line_takes_credentials_from_flags_and_environment(
    mutual: GatewayThread,
    files: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "key").write_text(KEY + "\n")
    flags = ["--target", mutual.target, "--tls-ca", files["ca"], "--client-cert", files["cert"]]
    flags += ["--client-key", files["key"]]
    assert main(["generate", "Hi", *flags, "--api-key-file", str(tmp_path / "key")]) == 0
    assert main(["generate", "Hi", *flags]) == 1
    error = "parley: error: no credentials, or wrong ones (show a key with --api-key-file or $PARLEY_API_KEY)\n"
    assert capsys.readouterr() == ("Hi\n", error)
    variables = {"TLS_CA": files["ca"], "CLIENT_CERT": files["cert"], "CLIENT_KEY": files["key"], "API_KEY": KEY}
    for name, value in variables.items():
        monkeypatch.setenv(f"PARLEY_{name}", value)
    assert main(["generate", "Hi", "--target", mutual.target]) == 0
    (tmp_path / "batch.jsonl").write_text('{"messages": [{"role": "ROLE_USER", "content": "Hi"}]}\n')
    assert (
        main(["batch", str(tmp_path / "batch.jsonl"), str(tmp_path / "answers.jsonl"), "--target", mutual.target]) == 0
    )
    for wrong in (["--tls-ca", "/nowhere"], ["--api-key-file", "/nowhere"]):
        with pytest.raises(SystemExit, match=r"parley: error: .*No such file"):
            main(["generate", "Hi", *wrong])
    monkeypatch.delenv("PARLEY_CLIENT_KEY")
    with pytest.raises(SystemExit, match="belong together"):
        main(["generate", "Hi"])
