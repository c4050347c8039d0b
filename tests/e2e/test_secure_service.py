"""`parleyd serve` with certificates, keys and the real model, and `parley` against it, as processes."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from parley.v1 import chat_pb2
from parley_client import Client, Unauthenticated, tls_credentials, user
from tests.support.certificates import Authority
from tests.support.raw_http2 import RawConnection, open_socket
from tests.support.served import ServedProcess, serve_until_exit

UNAUTHENTICATED = "16"
MARKER = "Repeat after me: xyzzy-marker"


@pytest.mark.timeout(240)
def test_the_service_with_tls_and_keys_and_what_it_logs(tmp_path: Path) -> None:
    made = serve_until_exit(["keys", "new", "--name", "billing"])
    (tmp_path / "keys.toml").write_text(made.stdout)
    key = made.stderr.strip()
    authority = Authority()
    (tmp_path / "ca.pem").write_bytes(authority.cert)
    cert, private = authority.issue("server", dns=("localhost",), ip="127.0.0.1").write(tmp_path, "server")
    flags = ["--tls-cert", cert, "--tls-key", private, "--api-keys", str(tmp_path / "keys.toml")]
    with ServedProcess(*flags, "--drain-delay", "0", "--log-level", "debug") as served:
        credentials = tls_credentials(ca=tmp_path / "ca.pem")
        with Client(served.target, credentials=credentials, api_key=key) as client:
            client.wait_until_ready(timeout=180)
            answer = client.chat([user(MARKER)], max_new_tokens=8, temperature=0)
            assert answer.content
        with Client(served.target, credentials=credentials) as stranger, pytest.raises(Unauthenticated):
            stranger.chat([user(MARKER)])
        command = [sys.executable, "-m", "parley_client", "generate", MARKER, "--max-new-tokens", "8"]
        command += ["--temperature", "0", "--target", served.target, "--tls-ca", str(tmp_path / "ca.pem")]
        shown = subprocess.run(
            command, env={"PARLEY_API_KEY": key}, capture_output=True, text=True, timeout=60, check=True
        )
        assert shown.stdout.strip() == answer.content.strip()
        assert call_raw(served.target, authority, f"Bearer {key}".encode() + b"\xff") == UNAUTHENTICATED
        assert served.terminate() == 0
        log = served.log
    assert "key:billing] Generate OK" in log
    assert "UNAUTHENTICATED" in log
    for secret in (key, "xyzzy", answer.content):
        assert secret not in log


def call_raw(target: str, authority: Authority, authorization: bytes) -> str | None:
    context = ssl.create_default_context(cadata=authority.cert.decode())
    context.set_alpn_protocols(["h2"])
    with (
        open_socket(target) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        connection = RawConnection(secured)
        connection.call("GetModel", chat_pb2.GetModelRequest(), {"authorization": authorization})
        return connection.status()


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: others could read and send everything"),
        (["--tls-cert", "/nowhere", "--tls-key", "/nowhere"], "--tls-cert /nowhere cannot be read"),
        (["--api-keys", "/nowhere"], "--api-keys /nowhere cannot be read"),
    ],
)
def test_an_unsafe_or_broken_start_is_refused_in_one_line(flags: list[str], error: str) -> None:
    ended = serve_until_exit(["serve", "--port", "0", *flags])
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"parleyd: error: {error}")
    assert ended.stderr.count("\n") == 1


def test_what_strangers_send_writes_no_line_that_is_not_ours(tmp_path: Path) -> None:
    cert, private = Authority().issue("server", ip="127.0.0.1").write(tmp_path, "server")
    with ServedProcess(
        "--tls-cert", cert, "--tls-key", private, "--log-format", "json", "--drain-delay", "0"
    ) as served:
        for _ in range(3):
            with open_socket(served.target) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
                stranger.settimeout(10)
                assert stranger.recv(1) != b"H"  # the handshake has failed by then
        assert served.terminate() == 0
        lines = served.log.splitlines()
    assert lines
    for line in lines:
        json.loads(line)
