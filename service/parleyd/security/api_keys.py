"""API keys: stored as hashes in a TOML file, looked up for each call. new_key.py makes them."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection

import msgspec

from parleyd.errors import StartupError
from parleyd.security.caller import Caller, Rules, identity
from parleyd.security.rules import RuleFields
from parleyd.security.watched import read_file

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
        except (ValueError, RecursionError) as error:
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
