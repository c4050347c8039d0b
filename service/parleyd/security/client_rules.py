"""Rules by identity: a TOML file for clients that a certificate, a token or their address names."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import msgspec

from parleyd.errors import StartupError
from parleyd.security.caller import Rules
from parleyd.security.rules import RuleFields
from parleyd.security.watched import read_file

_FLAG = "--client-rules"
_KINDS = ("cert:", "jwt:", "ipv4:", "ipv6:")


class _Entry(RuleFields, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One `[[client]]` of the file."""

    identity: str


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    client: list[_Entry]


class ClientRules:
    """The entries of one reading of the file, in its order."""

    def __init__(self, entries: Sequence[tuple[re.Pattern[str], Rules]], defaults: Rules) -> None:
        self._entries = entries
        self._defaults = defaults

    @classmethod
    def read(cls, path: str, rpcs: Collection[str], defaults: Rules) -> ClientRules:
        """`rpcs` are the names an entry may allow; `defaults` are for what an entry leaves out, and whom none fits.

        Raises StartupError that names the file and what is wrong with it.
        """
        try:
            entries = msgspec.toml.decode(read_file(_FLAG, path), type=_File).client
        except (ValueError, RecursionError) as error:
            raise StartupError(f"{_FLAG} {path}: {error}") from error
        return cls([_parse(path, entry, rpcs, defaults) for entry in entries], defaults)

    def find(self, identity: str) -> Rules:
        """The rules of the first entry whose pattern fits."""
        return next((rules for pattern, rules in self._entries if pattern.fullmatch(identity)), self._defaults)


def _parse(path: str, entry: _Entry, rpcs: Collection[str], defaults: Rules) -> tuple[re.Pattern[str], Rules]:
    where = f"{_FLAG} {path}: client {entry.identity!r}"
    if not entry.identity.startswith(_KINDS):  # a key's rules stand beside its hash
        raise StartupError(f"{where}: identity must begin with one of {', '.join(_KINDS)}")
    return _compile(entry.identity), entry.rules(where, rpcs, defaults)


def _compile(pattern: str) -> re.Pattern[str]:
    """A star stands for anything. What is between two is looked for once, where it comes first: identities that are
    made for it would have others tried without end."""
    first, *middle = map(re.escape, pattern.split("*"))
    if not middle:
        return re.compile(first)
    *middle, last = middle
    return re.compile(first + "".join(f"(?>.*?{part})" for part in middle) + ".*" + last)
