"""Grammars of answers that must call tools, against the parser that finds the calls."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher

from parley.v1 import chat_pb2, message_pb2
from parleyd.gateway import tools
from parleyd.grammar.compiler import compile_grammar, load_tokenizer
from parleyd.grammar.formats import to_grammar
from parleyd.text.tool_format.detection import FORMATS
from parleyd.text.tool_format.hermes import HERMES
from parleyd.text.tool_format.llama3 import LLAMA3
from parleyd.text.tool_format.mistral import MISTRAL
from parleyd.text.tool_format.mistral11 import MISTRAL11
from parleyd.text.tool_format.parser import ToolCallParser
from parleyd.text.tool_format.tool_format import ToolFormat
from tests.support.tiny_tokenizer import IM_END_ID, VOCAB_SIZE, write_tiny_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/name"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"name": {"type": "string", "maxLength": 8}},
}
WEATHER = message_pb2.Tool(name="get_weather", parameters=json.dumps(SCHEMA))
CLOCK = message_pb2.Tool(name="get_time")
SPECIAL_IDS = {text: VOCAB_SIZE + index for index, text in enumerate(("[TOOL_CALLS]", "[ARGS]", "<think>", "</think>"))}
# Special tokens as `accepts` reads them.
WRITTEN = {text if text[0] == "[" else "\x00" + text: token_id for text, token_id in SPECIAL_IDS.items()}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = write_tiny_tokenizer(tmp_path_factory.mktemp("tiny"), further_specials=list(SPECIAL_IDS))
    return load_tokenizer(str(folder), VOCAB_SIZE + len(SPECIAL_IDS), [IM_END_ID])


def matcher_of(
    tokenizer: Any,
    tool_format: ToolFormat,
    reasoning: str | None = None,
    name: str = "",
    reasoning_markers: tuple[str, ...] = (),
) -> LLMatcher:
    """`reasoning_markers`: those that are special tokens."""
    request = chat_pb2.GenerateRequest(tools=[WEATHER, CLOCK], tool_choice=message_pb2.ToolChoice(name=name))
    markers = (*tool_format.markers, *reasoning_markers)
    special_ids = {marker: SPECIAL_IDS[marker] for marker in markers if marker in SPECIAL_IDS}
    source = tools.required_calls(request, tool_format, special_ids, reasoning)
    return compile_grammar(tokenizer, to_grammar("tool_calls", source))


def accepts(matcher: LLMatcher, text: str) -> bool:
    """Whether as an answer; \x00 before a marker of reasoning makes it the special token."""
    parts = re.split(r"(\[TOOL_CALLS\]|\[ARGS\]|\x00</?think>)", text)
    ids = [i for part in parts for i in ([WRITTEN[part]] if part in WRITTEN else part.encode())]
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


BERN, NOW = ("get_weather", '{"city": "Bern"}'), ("get_time", "{}")


@pytest.mark.parametrize(
    ("tool_format", "text", "calls"),
    [
        (HERMES, '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>', [NOW]),
        (
            HERMES,
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>',
            [BERN, NOW],
        ),
        (LLAMA3, '{"name": "get_weather", "parameters": {"city": "Bern"}}', [BERN]),
        (
            MISTRAL,
            '[TOOL_CALLS] [{"name": "get_time", "arguments": {}}, '
            '{"name": "get_weather", "arguments": {"city": "Bern"}}]',
            [NOW, BERN],
        ),
        (MISTRAL11, '[TOOL_CALLS]get_time[ARGS]{}[TOOL_CALLS]get_weather[ARGS]{"city": "Bern"}', [NOW, BERN]),
    ],
)
def test_what_the_grammar_demands_the_parser_reads(
    tokenizer: Any, tool_format: ToolFormat, text: str, calls: list[tuple[str, str]]
) -> None:
    assert accepts(matcher_of(tokenizer, tool_format), text)
    parser = ToolCallParser(tool_format, ["get_weather", "get_time"], str)
    found = parser.push(text)
    assert [(call.name, call.arguments) for call in found.tool_calls] == calls
    assert (found.content + parser.finish().content, parser.num_complete) == ("", len(calls))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hello",
        '<tool_call>\n{"name": "launch", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "get_time", "arguments": {"a": 1}}\n</tool_call>',
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bernernern"}}\n</tool_call>',
    ],
)
def test_nothing_else_is_an_answer(tokenizer: Any, text: str) -> None:
    assert not accepts(matcher_of(tokenizer, HERMES), text)


def test_a_named_tool_is_called_once(tokenizer: Any) -> None:
    call = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
    assert accepts(matcher_of(tokenizer, HERMES, name="get_time"), call)
    assert not accepts(matcher_of(tokenizer, HERMES, name="get_time"), f"{call}\n{call}")
    assert not accepts(matcher_of(tokenizer, HERMES, name="get_weather"), call)


@pytest.mark.parametrize("tool_format", FORMATS.values(), ids=FORMATS.keys())
def test_a_model_may_think_first(tokenizer: Any, tool_format: ToolFormat) -> None:
    before, _, after = tool_format.spelling
    opening = "" if tool_format.is_bare else tool_format.opening
    call = "{}".join(tool_format.spell_call("get_time"))
    call = f"{opening}{before}{call}{after}"
    thought = "Hm, <b>\n</thi… it is late.\n</think>\n\n"
    assert accepts(matcher_of(tokenizer, tool_format, "open"), thought + call)
    assert not accepts(matcher_of(tokenizer, tool_format, "open"), call)
    assert accepts(matcher_of(tokenizer, tool_format, "may"), "<think>\n" + thought + call)
    assert accepts(matcher_of(tokenizer, tool_format, "may"), call)
    assert not accepts(matcher_of(tokenizer, tool_format, "may"), thought + call)


def test_markers_of_reasoning_may_be_special_tokens(tokenizer: Any) -> None:
    call = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
    markers = ("<think>", "</think>")
    opened = matcher_of(tokenizer, HERMES, "open", reasoning_markers=markers)
    free = matcher_of(tokenizer, HERMES, "may", reasoning_markers=markers)
    for closing in ("\x00</think>", "</think>", "</thi</think \x00</think>"):
        assert accepts(opened.deep_copy(), f"Hm,\n{closing}\n\n{call}")
        assert not accepts(opened.deep_copy(), f"Hm,\n{closing}\n\nWell, {call}")
        for opening in ("\x00<think>", "<think>"):
            assert accepts(free.deep_copy(), f"{opening}\nHm,\n{closing}\n\n{call}")
    assert accepts(free.deep_copy(), call)
    assert not accepts(free.deep_copy(), f"\x00</think>{call}")
