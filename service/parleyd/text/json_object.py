"""JSON objects that a conversation can hold: whole ones in requests, and tool calls' arguments as a model writes them.

They go on into prompts and grammars. Both readers here have one idea of what those can hold, so that a call that is
complete in an answer may stand in the next request.
"""

from __future__ import annotations

import json
import math
from enum import Enum, auto
from typing import Any

import regex

# Each level takes frames of the stack wherever it is walked, and compilers of grammars take no more than 128.
_MAX_LEVELS = 100
_TOO_DEEP = f"it is nested more than {_MAX_LEVELS} levels deep"
# Each character of a number that arrives in pieces has those before it read again.
_MAX_NUMBER_CHARACTERS = 1000

_SPACE = frozenset(" \t\n\r")
_STRING_CHARS = regex.compile(r'[^"\\\x00-\x1f]*')
_SCALAR = regex.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_HEX = "[0-9a-fA-F]"
# A surrogate is half of a character, so it comes as a pair.
_ESCAPE = regex.compile(
    rf'\\(?:["\\/bfnrt]|u(?:[0-9abcefABCEF]{_HEX}{{3}}|[dD][0-7]{_HEX}{{2}}'
    rf"|[dD][89abAB]{_HEX}{{2}}\\u[dD][c-fC-F]{_HEX}{{2}}))"
)


def load_object(text: str) -> dict[str, Any]:
    """Raises ValueError where the text is no JSON object, or one that cannot be written into a prompt."""
    try:
        value = _DECODER.decode(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair, which is no character") from None
    if not isinstance(value, dict):
        raise ValueError("it is no object")
    if _is_nested_deeper(value, _MAX_LEVELS):
        raise ValueError(_TOO_DEEP)
    return value


def _is_nested_deeper(value: Any, num_levels: int) -> bool:
    level = [value]
    for _ in range(num_levels):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return any(isinstance(one, dict | list) for one in level)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _parse_float(text: str) -> float:
    _check_length(text)
    if math.isinf(value := float(text)):
        raise ValueError(f"{text[:32]} is too large a number")
    return value


def _parse_int(text: str) -> int:
    _check_length(text)
    return int(text)


def _check_length(number: str) -> None:
    if len(number) > _MAX_NUMBER_CHARACTERS:
        raise ValueError(f"a number of {len(number)} digits is too long")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_parse_float, parse_int=_parse_int)


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
                    return len(self._begun) <= _MAX_NUMBER_CHARACTERS
                if not _is_scalar(self._begun):
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
        return len(self._closers) <= _MAX_LEVELS


def _is_scalar(text: str) -> bool:
    try:
        _DECODER.decode(text)
    except ValueError:
        return False
    return True
