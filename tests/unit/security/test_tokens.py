"""JSON Web Tokens: what is let in, and every forgery we know of refused."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from parleyd.errors import StartupError, Unauthenticated
from parleyd.security.tokens import Tokens
from tests.support import tokens
from tests.support.tokens import AUDIENCE, EC_KEY, ED_KEY, ISSUER, RSA_KEY, forged, jwk, key_set, public_pem, token


def read(folder: Path, content: str) -> Tokens:
    path = folder / "jwks.json"
    path.write_text(content)
    return Tokens.read(str(path), ISSUER, AUDIENCE)


@pytest.fixture
def verifier(tmp_path: Path) -> Tokens:
    return read(tmp_path, key_set())


@pytest.mark.parametrize(
    ("key", "algorithm", "kid"), [(RSA_KEY, "RS256", "rsa"), (EC_KEY, "ES256", "ec"), (ED_KEY, "EdDSA", "ed")]
)
def test_a_valid_token_names_its_subject(verifier: Tokens, key: Any, algorithm: str, kid: str) -> None:
    assert verifier.verify(token(key, algorithm, kid)) == "jwt:alice"


def test_the_audience_may_be_one_of_several_and_clocks_may_differ_a_little(verifier: Tokens) -> None:
    verifier.verify(token(aud=["other", AUDIENCE], nbf=int(time.time()) + 10, iat=None))
    verifier.verify(token(exp=int(time.time()) - 10))


@pytest.mark.parametrize(
    "claims",
    [
        {"exp": int(time.time()) - 60},
        {"exp": None},
        {"exp": "tomorrow"},
        {"nbf": int(time.time()) + 10**6},
        {"iss": "https://evil.example"},
        {"iss": None},
        {"aud": "another"},
        {"aud": None},
        {"sub": None},
        {"sub": ""},
        {"sub": "two\nlines"},
        {"sub": "x" * 257},
    ],
    ids=lambda claims: "-".join(claims),
)
def test_claims_are_checked(verifier: Tokens, claims: dict[str, Any]) -> None:
    with pytest.raises(Unauthenticated):
        verifier.verify(token(**claims))


@pytest.mark.parametrize(
    "forgery",
    [
        forged({"alg": "none", "kid": "rsa"}, None),
        forged({"alg": "none", "kid": "rsa"}, b"x"),
        forged({"alg": "None", "kid": "rsa"}, None),
        forged({"kid": "rsa"}, None),
        forged({"alg": "HS256", "kid": "rsa"}, public_pem()),
        forged({"alg": "HS256", "kid": "rsa"}, public_pem().strip()),
        forged({"alg": "HS256", "kid": "rsa"}, json.dumps(jwk(RSA_KEY, kid="rsa")).encode()),
        forged({"alg": "RS256", "kid": "rsa", "jwk": jwk(EC_KEY)}, b"x"),
        forged({"alg": "HS256", "kid": ["rsa"]}, b"x"),
        token(rsa.generate_private_key(65537, 2048)),
        token(ec.generate_private_key(ec.SECP256R1()), "ES256", "ec"),
        token(EC_KEY, "ES256", "rsa"),
        token(RSA_KEY, "RS512"),
        token(RSA_KEY, "PS256"),
        token(kid="unknown"),
        token(kid=None),
        token()[:-4],
        token() + "x",
        "..",
        "a.b.c",
        "é.é.é",
        "W" * 6000 + ".W.W",
    ],
)
def test_forgeries_are_refused(verifier: Tokens, forgery: str) -> None:
    with pytest.raises(Unauthenticated) as refused:
        verifier.verify(forgery)
    assert str(refused.value) == "no credentials, or wrong ones"


def test_a_token_with_its_payload_changed_is_refused(verifier: Tokens) -> None:
    header, payload, signature = token().split(".")
    verifier.verify(f"{header}.{payload}.{signature}")
    other = token(sub="root").split(".")[1]
    with pytest.raises(Unauthenticated):
        verifier.verify(f"{header}.{other}.{signature}")


def test_tokens_need_not_name_the_only_key(tmp_path: Path) -> None:
    read(tmp_path, key_set(jwk(EC_KEY))).verify(token(EC_KEY, "ES256", None))


def test_keys_of_other_kinds_are_left_out_and_the_log_tells(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secret = {"kty": "oct", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3I", "kid": "secret"}
    weak = jwk(rsa.generate_private_key(65537, 1024), kid="weak")
    others = (
        secret, weak, jwk(RSA_KEY, kid="enc", use="enc"), jwk(RSA_KEY, kid="odd", alg="RS512"),
        jwk(RSA_KEY, kid="none", alg="none"),
    )  # fmt: skip
    verifier = read(tmp_path, key_set(jwk(EC_KEY, kid="ec"), *others))
    verifier.verify(token(EC_KEY, "ES256", "ec"))
    assert [record.args[2] for record in caplog.records if record.args] == ["secret", "weak", "enc", "odd", "none"]
    assert "c2VjcmV0" not in caplog.text
    with pytest.raises(Unauthenticated):
        verifier.verify(forged({"alg": "HS256", "kid": "secret"}, b"secret-secret-secret-secret-secr"))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"keys": 1}',
        '{"keys": [1]}',
        '{"keys": []}',
        key_set({"kty": "oct", "k": "eA"}),
        "[" * 100_000,
        key_set(jwk(RSA_KEY, kid="a"), jwk(EC_KEY, kid="a")),
        key_set(jwk(RSA_KEY), jwk(EC_KEY, kid="a")),
        key_set(jwk(RSA_KEY, kid=["a"])),
    ],
)
def test_a_broken_key_set_is_named(tmp_path: Path, content: str) -> None:
    with pytest.raises(StartupError, match=r"--jwks .*jwks\.json"):
        read(tmp_path, content)


def test_the_helper_makes_valid_claims() -> None:
    assert tokens.claims(sub=None).keys() == {"iss", "aud", "iat", "nbf", "exp"}
