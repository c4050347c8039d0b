"""JSON objects that a conversation can hold, and that go on into prompts and grammars.

Those of requests are loaded here; json_scanner.py finds those that a model writes, and has the same idea of them.
"""

from __future__ import annotations

import json
import math
from typing import Any

# Each level takes frames of the stack wherever it is walked, and compilers of grammars take no more than 128.
MAX_LEVELS = 100
_TOO_DEEP = f"it is nested more than {MAX_LEVELS} levels deep"
# Each character of a number that arrives in pieces has those before it read again.
MAX_NUMBER_CHARACTERS = 1000


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
    if _is_nested_deeper(value, MAX_LEVELS):
        raise ValueError(_TOO_DEEP)
    return value


def is_scalar(text: str) -> bool:
    """Whether a number or literal is whole, and one that an object may hold."""
    try:
        _DECODER.decode(text)
    except ValueError:
        return False
    return True


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
    if len(number) > MAX_NUMBER_CHARACTERS:
        raise ValueError(f"a number of {len(number)} digits is too long")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_parse_float, parse_int=_parse_int)
