"""JSON objects as conversations may hold them."""

from __future__ import annotations

import pytest

from parleyd.text.json_object import load_object


def nested(num_levels: int) -> str:
    """An object in which lists are nested, so many levels in all."""
    return '{"a": ' + "[" * (num_levels - 1) + "]" * (num_levels - 1) + "}"


@pytest.mark.parametrize(
    "text", ["{}", '{"a": [1, -2.5e3, null, true, "\\ud83d\\ude00"]}', '{"a": ' + 1000 * "7" + "}", nested(100)]
)
def test_what_a_prompt_can_hold_is_taken(text: str) -> None:
    assert isinstance(load_object(text), dict)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "no object"),
        ("{", "Expecting property name"),
        ('{"a": NaN}', "NaN is no JSON"),
        ('{"a": -Infinity}', "-Infinity is no JSON"),
        ('{"a": [1e999]}', "1e999 is too large"),
        ('{"a": ' + 5000 * "7" + "}", "a number of 5000 digits is too long"),
        ('{"a": 0.' + 999 * "7" + "}", "a number of 1001 digits is too long"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ('{"\\udc00": 1}', "half of a surrogate pair"),
        (nested(101), "more than 100 levels"),
        (nested(100_000), "more than 100 levels"),
        (101 * '{"a": ' + "1" + 101 * "}", "more than 100 levels"),
    ],
)
def test_what_it_cannot_hold_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_object(text)
