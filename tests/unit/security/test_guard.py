"""Security settings that contradict each other or name broken files stop the start, by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from parleyd.config import SecuritySettings
from parleyd.errors import StartupError
from parleyd.security.caller import certificate_identity
from parleyd.security.guard import Guard, check_address, check_admin_address
from tests.support.certificates import Authority

AUTHORITY = Authority()


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"tls_cert": "a"}, "--tls-cert and --tls-key belong together"),
        ({"tls_key": "a"}, "--tls-cert and --tls-key belong together"),
        ({"tls_client_ca": "a"}, "--tls-client-ca needs"),
        ({"jwks": "a"}, "--jwks, --jwt-issuer and --jwt-audience belong together"),
        ({"jwks": "a", "jwt_issuer": "b"}, "belong together"),
        ({"jwt_issuer": "a", "jwt_audience": "b"}, "belong together"),
        ({"api_keys": ""}, "--api-keys is empty"),
        ({"tls_client_ca": ""}, "--tls-client-ca is empty"),
    ],
)
def test_contradictions_stop_the_start(settings: dict[str, str], what: str) -> None:
    with pytest.raises(StartupError, match=what):
        Guard(SecuritySettings(**settings), [])  # type: ignore[arg-type]


def _pem(key: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _encrypted_key() -> bytes:
    key = serialization.load_pem_private_key(AUTHORITY.issue("a").key, None)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
    )


@pytest.mark.parametrize(
    ("broken", "content", "what"),
    [
        ("cert.pem", None, r"--tls-cert .*cert\.pem cannot be read: No such file"),
        ("cert.pem", b"", r"--tls-cert .*cert\.pem holds no certificate"),
        ("cert.pem", AUTHORITY.cert[:200], r"--tls-cert .*cert\.pem holds no certificate"),
        ("cert.key", b"", r"--tls-key .*cert\.key holds no private key"),
        ("cert.key", AUTHORITY.cert, r"--tls-key .*cert\.key holds no private key"),
        ("cert.key", AUTHORITY.issue("b").key, r"--tls-key .*cert\.key is not the key of --tls-cert .*cert\.pem"),
        ("cert.key", _encrypted_key(), r"--tls-key .*cert\.key is encrypted"),
        ("cert.key", _pem(ed25519.Ed25519PrivateKey.generate()), r"--tls-key .*cert\.key is neither"),
        ("cert.key", _pem(ec.generate_private_key(ec.SECP256K1())), r"--tls-key .*cert\.key is on the curve secp256k1"),
        ("ca.pem", None, r"--tls-client-ca .*ca\.pem cannot be read"),
        ("ca.pem", b"nothing", r"--tls-client-ca .*ca\.pem holds no certificate"),
    ],
)
def test_broken_files_stop_the_start(tmp_path: Path, broken: str, content: bytes | None, what: str) -> None:
    cert, key = AUTHORITY.issue("localhost").write(tmp_path, "cert")
    (tmp_path / "ca.pem").write_bytes(AUTHORITY.cert)
    if content is None:
        (tmp_path / broken).unlink()
    else:
        (tmp_path / broken).write_bytes(content)
    settings = SecuritySettings(tls_cert=cert, tls_key=key, tls_client_ca=str(tmp_path / "ca.pem"))
    with pytest.raises(StartupError, match=what):
        Guard(settings, [])


@pytest.mark.parametrize("days", [(-30, -1), (1, 30)])
def test_the_log_tells_of_a_certificate_that_is_not_valid_now(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, days: tuple[int, int]
) -> None:
    cert, key = AUTHORITY.issue("localhost", since_days=days[0], days=days[1]).write(tmp_path, "cert")
    Guard(SecuritySettings(tls_cert=cert, tls_key=key), [])
    assert f"--tls-cert {cert} is valid from" in caplog.text


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.1.2.3", "parley.internal", "", "::ffff:10.0.0.1", "localhost.example"]
)
def test_plain_text_beyond_this_machine_must_be_asked_for(host: str) -> None:
    with pytest.raises(StartupError, match=f"--host {host}: others could read.*--tls-cert.*--insecure"):
        check_address(host, SecuritySettings(api_keys="keys.toml"))
    check_address(host, SecuritySettings(insecure=True))
    check_address(host, SecuritySettings(tls_cert="cert.pem"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_plain_text_on_this_machine_needs_no_flag(host: str) -> None:
    check_address(host, SecuritySettings())
    check_admin_address(host, SecuritySettings())


def test_the_admin_port_is_plain_text_whatever_the_main_port_is() -> None:
    with pytest.raises(StartupError, match=r"--admin-host 0\.0\.0\.0: the admin port is plain text.*--insecure"):
        check_admin_address("0.0.0.0", SecuritySettings(tls_cert="cert.pem", tls_key="key.pem"))
    check_admin_address("0.0.0.0", SecuritySettings(insecure=True))


@pytest.mark.parametrize(
    ("names", "identity"),
    [
        ({"peer_spiffe_id": [b"spiffe://a/b"], "peer_dns": [b"b"], "x509_common_name": [b"c"]}, "cert:spiffe://a/b"),
        ({"peer_dns": [b"b.example", b"c.example"], "x509_common_name": [b"c"]}, "cert:b.example"),
        ({"x509_common_name": [b"c"]}, "cert:c"),
        ({"x509_common_name": [b"c\nINFO all is well"]}, None),
        ({"peer_dns": [b"\xff\x00"], "x509_common_name": [b"c"]}, "cert:c"),
        ({}, None),
        ({"x509_common_name": [b"spiffe://a/b"]}, None),
        ({"peer_dns": [b"SPIFFE://a/b"], "x509_common_name": [b"c"]}, "cert:c"),
        ({"x509_common_name": [b"ipv4:10.0.0.7"]}, None),
        ({"x509_common_name": [b"ipv6:2001:db8::7"]}, None),
        ({"peer_dns": [b"b" * 257], "x509_common_name": [b"c" * 256]}, f"cert:{'c' * 256}"),
    ],
)
def test_a_certificate_names_its_client(names: dict[str, list[bytes]], identity: str | None) -> None:
    assert certificate_identity(names) == identity
