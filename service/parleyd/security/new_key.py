"""What `parleyd keys new` makes: an API key, and the lines that let it in. Standard library only: needs no service.

A key is 256 random bits, so one SHA-256 is enough to store it by: nobody can search that space. Slow hashes such as
bcrypt are for passwords that people choose, and would cost each call tens of milliseconds of the gateway's CPU.
"""

from __future__ import annotations

import hashlib
import secrets

_PREFIX = "parley_"  # so that scanners find keys that were published by mistake


def new_key() -> str:
    """A fresh key."""
    return _PREFIX + secrets.token_urlsafe(32)


def entry_for(name: str, key: str) -> str:
    """The lines that let `key` in under `name`."""
    return f'[[key]]\nname = "{name}"\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n'
