"""Reasoning in texts as models write them, in any pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parleyd.text.answer_parser import AnswerParser
from parleyd.text.parsed_text import ParsedText
from parleyd.text.reasoning import ReasoningParser
from parleyd.text.tool_format.hermes import HERMES
from parleyd.text.tool_format.parser import ToolCallParser


def parse(*pieces: str, is_open: bool = False, begun: str = "") -> tuple[str, str]:
    """Reasoning and content."""
    parser = ReasoningParser(is_open=is_open, begun=begun)
    parsed = ParsedText.join([*(parser.push(piece) for piece in pieces), parser.finish()])
    return parsed.reasoning_content, parsed.content


@pytest.mark.parametrize(
    ("text", "is_open", "expected"),
    [
        ("<think>\nOkay, 2 < 3.\n\nSo yes.\n</think>\n\nYes. ", False, ("Okay, 2 < 3.\n\nSo yes.", "Yes. ")),
        ("\nOkay.\n</think>\n\nYes.", True, ("Okay.", "Yes.")),
        ("<think>\n\n</think>\n\nYes.", False, ("", "Yes.")),
        ("<think>\nOkay, cut </thi", False, ("Okay, cut </thi", "")),
        ("Okay, never closed\n", True, ("Okay, never closed", "")),
        (" \nHello </think> <think> a", False, ("", " \nHello </think> <think> a")),
        ("<thin", False, ("", "<thin")),
        ("<think>a</think>b<think>c</think>", False, ("a", "b<think>c</think>")),
        (" \n", False, ("", " \n")),
    ],
)
def test_reasoning_is_told_from_content(text: str, is_open: bool, expected: tuple[str, str]) -> None:
    assert parse(text, is_open=is_open) == parse(*text, is_open=is_open) == expected


@pytest.mark.parametrize(
    ("begun", "text", "expected"),
    [
        ("\nI add", " four.\n</think>\n\n8", (" four.", "8")),
        ("\nI add.\n</thi", "nk>\n\n8", ("", "8")),
        ("\nI write </thi", "s, </think>8", ("s,", "8")),
        ("\nI write </thi", "", ("", "")),
        ("\n", "\nI add", ("I add", "")),
    ],
)
def test_reasoning_goes_on_where_the_prompt_leaves_it(begun: str, text: str, expected: tuple[str, str]) -> None:
    assert parse(text, is_open=True, begun=begun) == parse(*text, is_open=True, begun=begun) == expected


def test_reasoning_goes_out_as_it_is_written() -> None:
    parser = ReasoningParser()
    pieces = ["<think>", "\nLet", " me see.", " \n", "</th", "ink>", "\n\n", "Yes", "."]
    sent = [(parsed.reasoning_content, parsed.content) for parsed in map(parser.push, pieces)]
    assert sent == [("", ""), ("Let", ""), (" me see.", ""), *[("", "")] * 4, ("", "Yes"), ("", ".")]


@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("text", [" " * 300 + "<think>a</think>b", "<think>a" + "\n" * 300 + "</think>b", " " * 300])
def test_white_space_without_end_is_not_held_back_without_end(text: str, is_open: bool) -> None:
    assert parse(text, is_open=is_open) == parse(*text, is_open=is_open)
    parser = ReasoningParser(is_open=is_open)
    sent = [parser.push(piece) for piece in ("x", *["\n" * 100] * 10)]
    assert sum(len(part.content) + len(part.reasoning_content) for part in sent) > 700


@given(
    parts=st.lists(st.sampled_from(("<think>", "</think>", "<th", "ink>", "</", " ", "\n", "why", "x")), max_size=9),
    is_open=st.booleans(),
    data=st.data(),
)
def test_the_result_depends_on_the_text_alone(parts: list[str], is_open: bool, data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(*pieces, is_open=is_open) == parse(text, is_open=is_open)


def test_calls_are_sought_after_the_reasoning_only() -> None:
    call = '<tool_call>\n{"name": "run", "arguments": {"a": 1}}\n</tool_call>'
    parser = AnswerParser(ReasoningParser(), ToolCallParser(HERMES, ["run"], str))
    text = f"<think>\nI could {call}\n</think>\n\nSo:\n{call}"
    parsed = ParsedText.join([*map(parser.push, text), parser.finish()])
    assert (parsed.reasoning_content, parsed.content) == (f"I could {call}", "So:")
    assert [piece.arguments for piece in parsed.tool_calls] == ['{"a": 1}']
    assert parser.num_complete_calls == 1
