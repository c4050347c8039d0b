"""JSON Web Tokens and key sets as an identity provider makes them, and as an attacker does."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

ISSUER, AUDIENCE = "https://issuer.example", "parley"

RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
ED_KEY = ed25519.Ed25519PrivateKey.generate()


def claims(**changed: Any) -> dict[str, Any]:
    """Valid claims, for five minutes from now; those given as None are left out."""
    now = int(time.time())
    valid = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "iat": now, "nbf": now, "exp": now + 300}
    return {name: value for name, value in {**valid, **changed}.items() if value is not None}


def token(key: Any = RSA_KEY, algorithm: str = "RS256", kid: str | None = "rsa", **changed: Any) -> str:
    """A signed token."""
    return jwt.encode(claims(**changed), key, algorithm, headers={"kid": kid} if kid else None)


def forged(header: dict[str, Any], secret: bytes | None, **changed: Any) -> str:
    """A token with any header; signed by HMAC with `secret`, which PyJWT itself would refuse, or not at all."""
    signed = ".".join(_base64(json.dumps(part).encode()) for part in (header, claims(**changed)))
    signature = b"" if secret is None else hmac.digest(secret, signed.encode(), hashlib.sha256)
    return f"{signed}.{_base64(signature)}"


def public_pem(key: rsa.RSAPrivateKey = RSA_KEY) -> bytes:
    """The public key as attackers find it published."""
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def jwk(key: Any, **fields: Any) -> dict[str, Any]:
    """A public key as an entry of a key set."""
    public = key.public_key()
    of_kind = {
        rsa.RSAPublicKey: jwt.algorithms.RSAAlgorithm,
        ec.EllipticCurvePublicKey: jwt.algorithms.ECAlgorithm,
        ed25519.Ed25519PublicKey: jwt.algorithms.OKPAlgorithm,
    }
    (algorithm,) = (algorithm for kind, algorithm in of_kind.items() if isinstance(public, kind))
    entry: dict[str, Any] = json.loads(algorithm.to_jwk(public))
    entry.pop("key_ops", None)
    return {**entry, **fields}


def key_set(*entries: dict[str, Any]) -> str:
    """A JWKS; by default with one key of each kind: `rsa`, `ec`, `ed`."""
    default = (jwk(RSA_KEY, kid="rsa"), jwk(EC_KEY, kid="ec"), jwk(ED_KEY, kid="ed"))
    return json.dumps({"keys": entries or default})


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
