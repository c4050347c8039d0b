from __future__ import annotations

import json

import pytest

from parleyd.grammar import formats
from parleyd.grammar.compiler import GrammarError


def test_memory_that_is_used_up_is_no_verdict_on_a_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    def use_up(_: str) -> str:
        raise MemoryError

    monkeypatch.setattr(formats, "resolve", use_up)
    with pytest.raises(MemoryError):  # it ends the checker process, and another is asked
        formats.to_grammar("grammar", 'root ::= "a"')


def test_hyphens_that_gbnf_reads_otherwise_are_refused_by_name() -> None:
    with pytest.raises(GrammarError, match=r"write \\- for the character"):
        formats.to_grammar("grammar", "root ::= [a-z--x]")


@pytest.mark.parametrize(
    "schema",
    [
        '{"const": 9007199254740993}',
        '{"enum": ["a", -9007199254740993]}',
        '{"properties": {"id": {"anyOf": [{"const": {"a": [1e5, 123456789012345678901234567890]}}]}}}',
    ],
)
def test_integers_that_would_become_others_are_refused(schema: str) -> None:
    for kind, source in (("json_schema", schema), ("tool_calls", tool_calls(schema))):
        with pytest.raises(GrammarError, match="beyond 2"):
            formats.to_grammar(kind, source)


@pytest.mark.parametrize("schema", ['{"const": 9007199254740992}', '{"enum": [true, null, 1.5]}', '{"maximum": 1e300}'])
def test_numbers_that_are_exact_or_mere_bounds_are_taken(schema: str) -> None:
    assert formats.to_grammar("json_schema", schema)


def tool_calls(schema: str) -> str:
    tools = {"f": ("{", "}", json.loads(schema))}
    return json.dumps(
        {"before": "", "between": None, "after": "", "tools": tools, "special_ids": {}, "reasoning": None}
    )
