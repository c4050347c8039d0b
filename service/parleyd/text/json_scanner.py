"""A JSON object that arrives in pieces: where it ends, or where it stops being JSON (RFC 8259, nothing looser)."""

from __future__ import annotations

from enum import Enum, auto

import regex

_SPACE = frozenset(" \t\n\r")
_STRING_CHARS = regex.compile(r'[^"\\\x00-\x1f]*')
_SCALAR = regex.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
# A longer number is none that a request may hold. Each of its characters has those before it read again.
_MAX_SCALAR_CHARACTERS = 1000
_HEX = frozenset("0123456789abcdefABCDEF")


class _Expects(Enum):
    OBJECT = auto()
    KEY = auto()
    KEY_OR_END = auto()
    COLON = auto()
    VALUE = auto()
    VALUE_OR_END = auto()
    COMMA_OR_END = auto()
    STRING = auto()  # more of one, or its end
    ESCAPED = auto()
    HEX_DIGIT = auto()
    SCALAR = auto()  # more of a number or literal, or what follows it


class JsonObjectScanner:
    """Feed it with `scan` until it `is_done` or `is_broken`."""

    def __init__(self) -> None:
        self.is_done = False
        self.is_broken = False
        self._expects = _Expects.OBJECT
        self._closers: list[str] = []
        self._is_key = False
        self._num_hex_digits = 0
        self._scalar = ""

    def scan(self, text: str) -> int:
        """How many characters of `text` belong to the object: all, or those before its end or its first fault."""
        position = 0
        while position < len(text) and not self.is_done:
            if self._expects is _Expects.STRING:
                position = _STRING_CHARS.match(text, position).end()
                if position == len(text):
                    break
            if not self._read(text[position]):
                self.is_broken = True
                break
            position += 1
        return position

    def _read(self, char: str) -> bool:
        """Takes one character; whether it may stand here."""
        match self._expects:
            case _Expects.STRING:
                return self._read_in_string(char)
            case _Expects.ESCAPED:
                self._num_hex_digits = 4
                self._expects = _Expects.HEX_DIGIT if char == "u" else _Expects.STRING
                return char in '"\\/bfnrtu'
            case _Expects.HEX_DIGIT:
                self._num_hex_digits -= 1
                if self._num_hex_digits == 0:
                    self._expects = _Expects.STRING
                return char in _HEX
            case _Expects.SCALAR:
                if _SCALAR.fullmatch(self._scalar + char, partial=True):
                    self._scalar += char
                    return len(self._scalar) <= _MAX_SCALAR_CHARACTERS
                if not _SCALAR.fullmatch(self._scalar):
                    return False
                self._expects = _Expects.COMMA_OR_END
        return char in _SPACE or self._read_structure(char)

    def _read_in_string(self, char: str) -> bool:
        if char == '"':
            self._expects = _Expects.COLON if self._is_key else _Expects.COMMA_OR_END
        elif char == "\\":
            self._expects = _Expects.ESCAPED
        else:
            return False  # a control character
        return True

    def _read_structure(self, char: str) -> bool:
        expects = self._expects
        takes_key = expects in (_Expects.KEY, _Expects.KEY_OR_END)
        takes_value = expects in (_Expects.VALUE, _Expects.VALUE_OR_END)
        may_close = expects in (_Expects.KEY_OR_END, _Expects.VALUE_OR_END, _Expects.COMMA_OR_END)
        if char == '"' and (takes_key or takes_value):
            self._is_key, self._expects = takes_key, _Expects.STRING
        elif char == "{" and (takes_value or expects is _Expects.OBJECT):
            self._open("}", _Expects.KEY_OR_END)
        elif char == "[" and takes_value:
            self._open("]", _Expects.VALUE_OR_END)
        elif may_close and char == self._closers[-1]:
            self._closers.pop()
            self._expects, self.is_done = _Expects.COMMA_OR_END, not self._closers
        elif char == "," and expects is _Expects.COMMA_OR_END:
            self._expects = _Expects.KEY if self._closers[-1] == "}" else _Expects.VALUE
        elif char == ":" and expects is _Expects.COLON:
            self._expects = _Expects.VALUE
        elif takes_value and _SCALAR.fullmatch(char, partial=True):
            self._scalar, self._expects = char, _Expects.SCALAR
        else:
            return False
        return True

    def _open(self, closer: str, expects: _Expects) -> None:
        self._closers.append(closer)
        self._expects = expects
