"""JsonObjectScanner against the standard library's decoder, and against what is taken back."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parleyd.text.json_object import load_object
from parleyd.text.json_scanner import JsonObjectScanner

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=5), VALUES, max_size=4)


def scan(text: str, size: int) -> tuple[int, JsonObjectScanner]:
    """How much of the text was taken, given in pieces of `size`."""
    scanner, taken = JsonObjectScanner(), 0
    for start in range(0, len(text), size):
        piece = text[start : start + size]
        taken += (n := scanner.scan(piece))
        if n < len(piece):
            break
    return taken, scanner


@given(value=OBJECTS, indent=st.none() | st.just(1), ascii_only=st.booleans(), size=st.integers(1, 30))
def test_an_object_is_taken_to_its_end_and_not_further(
    value: dict[str, object], indent: int | None, ascii_only: bool, size: int
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    taken, scanner = scan(text + " }] and more", size)
    assert (taken, scanner.is_done, scanner.is_broken) == (len(text), True, False)


@given(text=st.text(st.sampled_from('{{}}[],:"\\u00e1-+.e5 \ntruefalsn\x01'), max_size=24), size=st.integers(1, 24))
def test_whatever_is_no_json_is_found_to_be_none(text: str, size: int) -> None:
    text = "{" + text
    taken, scanner = scan(text, size)
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except ValueError:
        assert not scanner.is_done
    else:
        assert scanner.is_done and taken == end


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ('{"a": 1,}', 8),
        ("{'a': 1}", 1),
        ('{"a": 01}', 7),
        ('{"a": tru}', 9),
        ('{"a": NaN}', 6),
        ('{"a": ' + 1001 * "7" + "}", 1006),
        ('{"a": "x\ny"}', 8),
        ('{"a": "\\x"}', 8),
        ('{"a": "\\u12x4"}', 11),
        ('{"a": "\\udc00"}', 10),
        ('{"a": "\\ud83d\\ud83d"}', 16),
        ('{"a": "\\ud83d\\n"}', 14),
        ('{"\\ud83d": 1}', 8),
        ('{"a": 1e309}', 11),
        ('{"a": [-1e309 ]}', 13),
        ('{"a": ' + 400 * "7" + ".5}", 408),
        ('{"a": ' + 100 * "[", 105),
        (101 * '{"a": ', 600),
        ('{"a" 1}', 5),
        ('{"a": [1}', 8),
        ("[1]", 0),
    ],
)
@pytest.mark.parametrize("size", [1, 100])
def test_the_first_fault_is_where_it_stops(text: str, taken: int, size: int) -> None:
    n, scanner = scan(text, size)
    assert (n, scanner.is_broken, scanner.is_done) == (taken, True, False)


SCALARS = (
    "null", "-0.5e-400", "1e308", "1E+309", "-1e309", "1" + 308 * "0" + ".0", "1" + 309 * "0" + ".0", 1000 * "7",
    1001 * "7", "0." + 998 * "7", "0." + 999 * "7", '"\\u00e9"', '"\\uD83D\\uDE00"', '"\\ud83d"',
    '"\\ude00\\ud83d"', "01", "NaN",
)  # fmt: skip


@given(
    scalars=st.lists(st.sampled_from(SCALARS), min_size=1, max_size=3),
    num_levels=st.integers(1, 3) | st.integers(98, 102),
    size=st.integers(1, 30),
)
def test_what_is_taken_to_its_end_is_what_may_be_sent_back(scalars: list[str], num_levels: int, size: int) -> None:
    text = '{"a": ' + (num_levels - 1) * "[" + scalars[0] + (num_levels - 1) * "]"
    text += "".join(f', "b{i}": {scalar}' for i, scalar in enumerate(scalars[1:])) + "}"
    try:
        load_object(text)
    except ValueError:
        assert not scan(text, size)[1].is_done
    else:
        assert scan(text, size)[1].is_done
