"""JSON objects in requests, which go on into prompts and grammars: what those could not hold is refused."""

from __future__ import annotations

import json
import math
from typing import Any

# Each level takes frames of the stack wherever it is walked, and compilers of grammars take no more than 128.
_MAX_LEVELS = 100
_TOO_DEEP = f"it is nested more than {_MAX_LEVELS} levels deep"
_MAX_DIGITS = 1000


def load_object(text: str) -> dict[str, Any]:
    """Raises ValueError where the text is no JSON object, or one that cannot be written into a prompt."""
    try:
        value = json.loads(
            text, parse_constant=_refuse_constant, parse_float=_parse_finite, parse_int=_parse_short_integer
        )
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


def _parse_finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text[:32]} is too large a number")
    return value


def _parse_short_integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits is too long")
    return int(text)
