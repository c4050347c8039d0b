"""JSON Web Tokens, checked against the public keys of an identity provider (a JWKS file)."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa

from parleyd.errors import StartupError, Unauthenticated
from parleyd.security.caller import identity
from parleyd.security.watched import read_file

_logger = logging.getLogger("parleyd.security")

# Signatures that only the provider can make. Not "none", and nothing of the HS family: its secret would be the public
# key, which anybody has.
_ALGORITHMS = ("RS256", "ES256", "EdDSA")
_MIN_RSA_BITS = 2048
_REQUIRED = ("exp", "iss", "aud", "sub")
_CLOCK_SKEW_S = 30
_FLAG = "--jwks"


class Tokens:
    """The keys of one reading of the file, by key id."""

    def __init__(self, keys: dict[str | None, jwt.PyJWK], issuer: str, audience: str) -> None:
        self._keys = keys
        self._issuer = issuer
        self._audience = audience

    @classmethod
    def read(cls, path: str, issuer: str, audience: str) -> Tokens:
        """Raises StartupError that names the file. Keys of other kinds are left out, and the log tells."""
        try:
            entries = json.loads(read_file(_FLAG, path))["keys"]
            usable = [key for entry in entries if (key := _usable(path, entry))]
            keys: dict[str | None, jwt.PyJWK] = {key.key_id: key for key in usable}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, jwt.PyJWTError) as error:
            raise StartupError(f"{_FLAG} {path} is not a JSON Web Key Set, or broken") from error
        if not usable:
            raise StartupError(f"{_FLAG} {path} holds no public key for {', '.join(_ALGORITHMS)}")
        if len(keys) < len(usable):
            raise StartupError(f"{_FLAG} {path}: two keys have the same key id")
        if len(usable) == 1:
            keys[None] = usable[0]  # tokens need not name the only key
        elif None in keys:
            raise StartupError(f"{_FLAG} {path}: of several keys, each needs a key id")
        return cls(keys, issuer, audience)

    def verify(self, token: str) -> str:
        """The identity that the token speaks for. Raises Unauthenticated."""
        try:
            key = self._keys[jwt.get_unverified_header(token).get("kid")]
            claims = jwt.decode(
                token,
                key,
                algorithms=[key.algorithm_name],  # of our key: what the token's header asks for must match
                audience=self._audience,
                issuer=self._issuer,
                leeway=_CLOCK_SKEW_S,
                options={"require": list(_REQUIRED)},
            )
        except Exception as error:  # a stranger chose these bytes: whatever they break, it is no valid token
            raise Unauthenticated(f"token: {type(error).__name__}") from error
        who = identity("jwt", claims["sub"])
        if who is None:
            raise Unauthenticated("token: its subject is not 1 to 256 printable characters")
        return who


def _usable(path: str, entry: dict[str, Any]) -> jwt.PyJWK | None:
    """The key, if it is one to check signatures with, by an algorithm of ours."""
    if entry.get("use", "sig") == "sig":
        with suppress(jwt.PyJWKError, jwt.InvalidKeyError, NotImplementedError):  # the last of the algorithm "none"
            key = jwt.PyJWK(entry)
            weak = isinstance(key.key, rsa.RSAPublicKey) and key.key.key_size < _MIN_RSA_BITS
            if key.algorithm_name in _ALGORITHMS and not weak:
                return key
    _logger.warning("%s %s: key %r is not one for %s: left out", _FLAG, path, entry.get("kid"), ", ".join(_ALGORITHMS))
    return None
