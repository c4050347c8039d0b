"""JSON objects as a model writes them, piece by piece: tool calls' arguments.

What is complete here `json_object.load_object` takes, so that a call that is complete in an answer may stand in the
next request.
"""

from __future__ import annotations

from enum import Enum, auto

import regex

from parleyd.text.json_object import MAX_LEVELS, MAX_NUMBER_CHARACTERS, is_scalar

_SPACE = frozenset(" \t\n\r")
_STRING_CHARS = regex.compile(r'[^"\\\x00-\x1f]*')
_SCALAR = regex.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_HEX = "[0-9a-fA-F]"
# A surrogate is half of a character, so it comes as a pair.
_ESCAPE = regex.compile(
    rf'\\(?:["\\/bfnrt]|u(?:[0-9abcefABCEF]{_HEX}{{3}}|[dD][0-7]{_HEX}{{2}}'
    rf"|[dD][89abAB]{_HEX}{{2}}\\u[dD][c-fC-F]{_HEX}{{2}}))"
)


class _Expects(Enum):
    OBJECT = auto()
    KEY = auto()
    KEY_OR_END = auto()
    COLON = auto()
    VALUE = auto()
    VALUE_OR_END = auto()
    COMMA_OR_END = auto()
    STRING = auto()  # more of one, or its end
    ESCAPE = auto()  # more of one
    SCALAR = auto()  # more of a number or literal, or what follows it


class JsonObjectScanner:
    """Finds where an object that arrives in pieces ends, or where it stops being one that `load_object` would take:
    feed it with `scan` until it `is_done` or `is_broken`."""

    def __init__(self) -> None:
        self.is_done = False
        self.is_broken = False
        self._expects = _Expects.OBJECT
        self._closers: list[str] = []
        self._is_key = False
        self._begun = ""  # of an escape or a scalar

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
            case _Expects.ESCAPE:
                return self._read_in_escape(char)
            case _Expects.SCALAR:
                if _SCALAR.fullmatch(self._begun + char, partial=True):
                    self._begun += char
                    return len(self._begun) <= MAX_NUMBER_CHARACTERS
                if not is_scalar(self._begun):
                    return False
                self._expects = _Expects.COMMA_OR_END
        return char in _SPACE or self._read_structure(char)

    def _read_in_string(self, char: str) -> bool:
        if char == '"':
            self._expects = _Expects.COLON if self._is_key else _Expects.COMMA_OR_END
        elif char == "\\":
            self._begun, self._expects = char, _Expects.ESCAPE
        else:
            return False  # a control character
        return True

    def _read_in_escape(self, char: str) -> bool:
        self._begun += char
        match = _ESCAPE.fullmatch(self._begun, partial=True)
        if match and not match.partial:
            self._expects = _Expects.STRING
        return match is not None

    def _read_structure(self, char: str) -> bool:
        expects = self._expects
        takes_key = expects in (_Expects.KEY, _Expects.KEY_OR_END)
        takes_value = expects in (_Expects.VALUE, _Expects.VALUE_OR_END)
        may_close = expects in (_Expects.KEY_OR_END, _Expects.VALUE_OR_END, _Expects.COMMA_OR_END)
        if char == '"' and (takes_key or takes_value):
            self._is_key, self._expects = takes_key, _Expects.STRING
        elif char == "{" and (takes_value or expects is _Expects.OBJECT):
            return self._open("}", _Expects.KEY_OR_END)
        elif char == "[" and takes_value:
            return self._open("]", _Expects.VALUE_OR_END)
        elif may_close and char == self._closers[-1]:
            self._closers.pop()
            self._expects, self.is_done = _Expects.COMMA_OR_END, not self._closers
        elif char == "," and expects is _Expects.COMMA_OR_END:
            self._expects = _Expects.KEY if self._closers[-1] == "}" else _Expects.VALUE
        elif char == ":" and expects is _Expects.COLON:
            self._expects = _Expects.VALUE
        elif takes_value and _SCALAR.fullmatch(char, partial=True):
            self._begun, self._expects = char, _Expects.SCALAR
        else:
            return False
        return True

    def _open(self, closer: str, expects: _Expects) -> bool:
        self._closers.append(closer)
        self._expects = expects
        return len(self._closers) <= MAX_LEVELS
