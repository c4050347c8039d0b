"""API keys: made by `parleyd keys new`, stored as hashes in a TOML file, looked up for each call.

A key is 256 random bits, so one SHA-256 is enough to store it by: nobody can search that space. Slow hashes such as
bcrypt are for passwords that people choose, and would cost each call tens of milliseconds of the gateway's CPU.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Collection

import msgspec

from parleyd.errors import StartupError
from parleyd.security.caller import Caller, Rules, identity
from parleyd.security.rules import RuleFields
from parleyd.security.watched import read_file

_PREFIX = "parley_"  # so that scanners find keys that were published by mistake
_FLAG = "--api-keys"


class _Entry(RuleFields, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One `[[key]]` of the file."""

    name: str
    sha256: str


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: list[_Entry]


class ApiKeys:
    """The keys of one reading of the file."""

    def __init__(self, callers: dict[bytes, Caller]) -> None:
        self._callers = callers

    @classmethod
    def read(cls, path: str, rpcs: Collection[str], defaults: Rules) -> ApiKeys:
        """`rpcs` are the names an entry may allow; `defaults` are for what an entry leaves out.

        Raises StartupError that names the file and what is wrong with it, never its content.
        """
        try:
            entries = msgspec.toml.decode(read_file(_FLAG, path), type=_File).key
        except (msgspec.DecodeError, ValueError) as error:
            raise StartupError(f"{_FLAG} {path}: {error}") from error
        callers: dict[bytes, Caller] = {}
        for entry in entries:
            callers[_digest(path, entry)] = _caller(path, entry, rpcs, defaults)
        if not entries:
            raise StartupError(f"{_FLAG} {path} holds no key")
        if len(callers) < len(entries):
            raise StartupError(f"{_FLAG} {path}: one key is there twice")
        return cls(callers)

    def find(self, key: str) -> Caller | None:
        """Whose key it is. Takes the same time for every key: all hashes are compared, each in constant time."""
        digest = hashlib.sha256(key.encode()).digest()
        found = None
        for known, caller in self._callers.items():
            if hmac.compare_digest(known, digest):
                found = caller
        return found


def new_key() -> str:
    """A fresh key."""
    return _PREFIX + secrets.token_urlsafe(32)


def entry_for(name: str, key: str) -> str:
    """The lines that let `key` in under `name`."""
    return f'[[key]]\nname = "{name}"\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n'


def _caller(path: str, entry: _Entry, rpcs: Collection[str], defaults: Rules) -> Caller:
    who = identity("key", entry.name)
    if who is None:
        raise StartupError(f"{_FLAG} {path}: a name must be 1 to 256 printable characters")
    return Caller(who, entry.rules(f"{_FLAG} {path}: key {entry.name!r}", rpcs, defaults))


def _digest(path: str, entry: _Entry) -> bytes:
    try:
        digest = bytes.fromhex(entry.sha256)
    except ValueError:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise StartupError(f"{_FLAG} {path}: key {entry.name!r}: sha256 must be 64 hexadecimal digits")
    return digest
