from __future__ import annotations

import pytest

from parleyd.grammar import formats


def test_memory_that_is_used_up_is_no_verdict_on_a_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    def use_up(_: str) -> str:
        raise MemoryError

    monkeypatch.setattr(formats, "gbnf_to_lark", use_up)
    with pytest.raises(MemoryError):  # it ends the checker process, and another is asked
        formats.to_grammar("grammar", 'root ::= "a"')
