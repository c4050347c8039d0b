"""Texts as models of each family write them, in any pieces."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parleyd.text.parsed_text import ParsedText
from parleyd.text.tool_format.call_id import call_id
from parleyd.text.tool_format.hermes import HERMES
from parleyd.text.tool_format.llama3 import LLAMA3
from parleyd.text.tool_format.mistral import MISTRAL
from parleyd.text.tool_format.mistral11 import MISTRAL11
from parleyd.text.tool_format.parser import ToolCallParser
from parleyd.text.tool_format.tool_format import ToolFormat

NAMES = ("get_weather", "get_time", "run")
PARIS, BERN = '{"city": "Paris", "unit": "celsius"}', '{"city": "Bern"}'


def parse(tool_format: ToolFormat, *pieces: str) -> tuple[str, list[tuple[str, str]], int]:
    """Content, (name, arguments) of each call, and how many are complete."""
    parser = ToolCallParser(tool_format, NAMES, lambda index: f"id-{index}")
    parsed = ParsedText.join([*(parser.push(piece) for piece in pieces), parser.finish()])
    assert [call.id for call in parsed.tool_calls] == [f"id-{i}" for i in range(len(parsed.tool_calls))]
    return parsed.content, [(call.name, call.arguments) for call in parsed.tool_calls], parser.num_complete


WRITTEN = [
    # Qwen 2.5, Hermes
    (
        HERMES,
        f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>',
        "",
        [("get_weather", PARIS)],
    ),
    (
        HERMES,
        'I will look both up.\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>',
        "I will look both up.",
        [("get_weather", BERN), ("get_time", "{}")],
    ),
    (
        HERMES,
        f'<tool_call>{{"name":"get_weather","arguments":{BERN}}}</tool_call>\nDone.',
        "Done.",
        [("get_weather", BERN)],
    ),
    (HERMES, f'<tool_call>\n{{"name": "get_weather", "arguments": {BERN}}}', "", [("get_weather", BERN)]),
    (
        HERMES,
        '<tool_call>\n{"name": "run", "arguments": {"code": "print(\\"</tool_call> {}\\")\\n"}}\n</tool_call>',
        "",
        [("run", '{"code": "print(\\"</tool_call> {}\\")\\n"}')],
    ),
    # Llama 3.1 and 3.2
    (LLAMA3, f'{{"name": "get_weather", "parameters": {PARIS}}}', "", [("get_weather", PARIS)]),
    (LLAMA3, f'\n\n{{"name": "get_weather", "arguments": {BERN}}}', "", [("get_weather", BERN)]),
    (LLAMA3, f'<|python_tag|>{{"name": "get_weather", "parameters": {BERN}}}', "", [("get_weather", BERN)]),
    (
        LLAMA3,
        '{"type": "function", "name": "get_time", "parameters": {}}; '
        f'{{"name": "get_weather", "parameters": {BERN}}}',
        "",
        [("get_time", "{}"), ("get_weather", BERN)],
    ),
    # Mistral 7B v0.3, Nemo
    (MISTRAL, f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}}}]', "", [("get_weather", PARIS)]),
    (
        MISTRAL,
        f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {BERN}, "id": "VvvODy9mT"}}, '
        '{"name": "get_time", "arguments": {}}]',
        "",
        [("get_weather", BERN), ("get_time", "{}")],
    ),
    # Mistral Small 3.2, Devstral, Ministral 3
    (MISTRAL11, f"[TOOL_CALLS]get_weather[ARGS]{PARIS}", "", [("get_weather", PARIS)]),
    (
        MISTRAL11,
        f"I will look both up.[TOOL_CALLS]get_weather[ARGS]{BERN}[TOOL_CALLS]get_time[ARGS] {{}}",
        "I will look both up.",
        [("get_weather", BERN), ("get_time", "{}")],
    ),
    (
        MISTRAL11,
        f"[TOOL_CALLS]get_weather[CALL_ID]VvvODy9mT[ARGS]{BERN}\nDone.",
        "Done.",
        [("get_weather", BERN)],
    ),
]

PLAIN = [
    (HERMES, "Hello, how are you? <b>Fine</b> < 3 <tool_ca"),
    (HERMES, "  Use <tool_call> to call.\n\n"),
    (HERMES, '<tool_call>\n{"name": "launch", "arguments": {}}\n</tool_call>'),
    (HERMES, '<tool_call>\n{"name": "get_time", "arguments": "now"}\n</tool_call>'),
    (HERMES, '<tool_call>\n{"arguments": {}, "name": "get_time"}\n</tool_call>'),
    (HERMES, '{"name": "get_time", "arguments": {}}'),
    (LLAMA3, '{"answer": 42}'),
    (LLAMA3, ' {"name": "Ada", "parameters": "none"} \n'),
    (LLAMA3, 'Call {"name": "get_time", "parameters": {}}'),
    (LLAMA3, '<|python_tag|>brave_search.call(query="weather")'),
    (MISTRAL, "[TOOL_CALLS] none"),
    (MISTRAL, '[1, 2] [TOOL_CALLS] [{"name": "launch", "arguments": {}}]'),
    (MISTRAL, " \n"),
    (MISTRAL11, "[TOOL_CALLS]launch[ARGS]{}"),
    (MISTRAL11, "[TOOL_CALLS]get_time {}"),
    (MISTRAL11, '[TOOL_CALLS]get_time[ARGS]"now"'),
    (MISTRAL11, '[TOOL_CALLS] [{"name": "get_time", "arguments": {}}]'),
    (MISTRAL11, "[ARGS]{} get_time[ARGS]{}"),
]


@pytest.mark.parametrize(("tool_format", "text", "content", "calls"), WRITTEN)
def test_calls_are_found_however_the_text_is_cut(
    tool_format: ToolFormat, text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    for size in (1, 2, 3, 7, len(text)):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert parse(tool_format, *pieces) == (content, calls, len(calls))


@pytest.mark.parametrize(("tool_format", "text"), PLAIN)
def test_text_that_is_no_call_stays_as_it_is(tool_format: ToolFormat, text: str) -> None:
    assert parse(tool_format, text) == (text, [], 0)
    assert parse(tool_format, *text) == (text, [], 0)


@pytest.mark.parametrize(
    ("tool_format", "text", "content", "calls", "num_complete"),
    [
        (HERMES, '<tool_call>{"name": "get_time", "arguments": {"zone": "C', "", [("get_time", '{"zone": "C')], 0),
        (
            HERMES,
            '<tool_call>{"name": "get_time", "arguments": {"zone": 1,}}</tool_call> ok',
            "}}</tool_call> ok",
            [("get_time", '{"zone": 1,')],
            0,
        ),
        (HERMES, '<tool_call>{"name": "get_time", "arguments": {}, "x": 1}', ', "x": 1}', [("get_time", "{}")], 1),
        (
            MISTRAL,
            '[TOOL_CALLS][{"name": "run", "arguments": {}}, {"name": "launch", "arguments": {}}]',
            ', {"name": "launch", "arguments": {}}]',
            [("run", "{}")],
            1,
        ),
        (
            HERMES,
            '<tool_call>{"name": "run", "arguments": {}}</tool_call>'
            '<tool_call>{"name": "run", "arguments": {"x": "y\nz"}}',
            '\nz"}}',
            [("run", "{}"), ("run", '{"x": "y')],
            1,
        ),
        (HERMES, '<tool_call>{"name": "run", "arguments": {} ', "", [("run", "{}")], 1),
        (HERMES, '<tool_call>{"name": "run", "arguments": {}}\n', "", [("run", "{}")], 1),
        (LLAMA3, '{"name": "run", "parameters": {}} That is it.', "That is it.", [("run", "{}")], 1),
        (
            LLAMA3,
            '{"name": "run", "parameters": {"x"{"name": "run", "parameters": {}}',
            '{"name": "run", "parameters": {}}',
            [("run", '{"x"')],
            0,
        ),
        (MISTRAL11, "[TOOL_CALLS]run[ARGS]{}}, ok", "}, ok", [("run", "{}")], 1),
        (MISTRAL11, '[TOOL_CALLS]get_time[ARGS]{"zone": "C', "", [("get_time", '{"zone": "C')], 0),
        (
            MISTRAL11,
            "[TOOL_CALLS]run[ARGS]{}[TOOL_CALLS]launch[ARGS]{}",
            "[TOOL_CALLS]launch[ARGS]{}",
            [("run", "{}")],
            1,
        ),
    ],
)
def test_of_a_broken_call_nothing_is_lost(
    tool_format: ToolFormat, text: str, content: str, calls: list[tuple[str, str]], num_complete: int
) -> None:
    assert parse(tool_format, text) == parse(tool_format, *text) == (content, calls, num_complete)


def test_the_name_goes_out_before_the_arguments_and_these_as_they_come() -> None:
    parser = ToolCallParser(HERMES, NAMES, lambda index: f"id-{index}")
    sent = [
        [(call.index, call.id, call.name, call.arguments) for call in parser.push(piece).tool_calls]
        for piece in (
            '<tool_call>\n{"name": "get_weather"',
            ', "arguments": {',
            '"city": "Be',
            'rn"}',
            "}\n</tool_call>",
            '<tool_call>{"name": "run", "arguments": {',
            "?",  # no JSON: nothing of the call
        )
    ]
    assert sent == [
        [],
        [(0, "id-0", "get_weather", "{")],
        [(0, "", "", '"city": "Be')],
        [(0, "", "", 'rn"}')],
        [],
        [(1, "id-1", "run", "{")],
        [],
    ]


def test_plain_text_waits_for_nothing_but_possible_markers() -> None:
    parser = ToolCallParser(HERMES, NAMES, str)
    assert [parser.push(piece).content for piece in ("Hi ", "you <", "b> <tool", "s>", " \n", ".")] == [
        "Hi",
        " you",
        " <b>",
        " <tools>",
        "",
        " \n.",
    ]


@pytest.mark.parametrize("tool_format", [HERMES, LLAMA3, MISTRAL, MISTRAL11])
@pytest.mark.parametrize("before", ["", "Hm.", "<tool_call>", '<tool_call>{"name": "run", "arguments": {}'])
def test_white_space_without_end_is_not_held_back_without_end(tool_format: ToolFormat, before: str) -> None:
    parser = ToolCallParser(tool_format, NAMES, str)
    parsed = ParsedText.join([parser.push(piece) for piece in (before, *[" " * 100] * 50)])
    assert len(parsed.content) > 4000 or parsed.tool_calls
    for opening in (tool_format.opening, "{"):
        text = before + " " * 300 + opening + '{"name": "run", "arguments": {}}'
        assert parse(tool_format, text) == parse(tool_format, *text)


PARTS = (
    "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "\n", " ", "[", "]", "}", ";", ", ", "{", "<tool",
    "text", '{"name": "get_time", "arguments": ', '{"name": "run", "parameters": ', '{"name": "x"', '{"a": [1, "}"]}',
    "{}", "{]", "run", "[ARGS]", "[CALL_ID]",
)  # fmt: skip


@given(
    tool_format=st.sampled_from((HERMES, LLAMA3, MISTRAL, MISTRAL11)),
    parts=st.lists(st.sampled_from(PARTS), max_size=10),
    data=st.data(),
)
def test_the_result_depends_on_the_text_alone(tool_format: ToolFormat, parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    content, calls, num_complete = parse(tool_format, text)
    assert parse(tool_format, *pieces) == parse(tool_format, *text) == (content, calls, num_complete)
    assert sum(_is_json(arguments) for _, arguments in calls) == num_complete
    if not calls:
        assert content == text


@given(parts=st.lists(st.sampled_from(PARTS), max_size=10), data=st.data())
def test_what_was_sent_at_a_cut_and_what_follows_are_the_whole(parts: list[str], data: st.DataObject) -> None:
    """What a resumed answer relies on: fed anew to the cut, the parser goes on as if nothing had happened."""
    text = "".join(parts)
    cut = data.draw(st.integers(0, len(text)))
    first, again = (ToolCallParser(HERMES, NAMES, str) for _ in range(2))
    sent = ParsedText.join([first.push(char) for char in text[:cut]])
    assert ParsedText.join([sent]) == ParsedText.join([again.push(text[:cut])])
    rest = [again.push(text[cut:]), again.finish()]
    whole = ToolCallParser(HERMES, NAMES, str)
    assert ParsedText.join([sent, *rest]) == ParsedText.join([whole.push(text), whole.finish()])


def test_ids_are_of_nine_letters_and_digits_and_always_the_same() -> None:
    ids = {call_id(seed, choice, index) for seed in (0, 1, 2**64 - 1) for choice in range(4) for index in range(8)}
    assert len(ids) == 3 * 4 * 8
    assert all(len(id_) == 9 and id_.isascii() and id_.isalnum() for id_ in ids)
    assert call_id(7, 0, 0) == call_id(7, 0, 0)


def test_an_id_that_is_taken_moves_on_and_meets_no_others() -> None:
    taken: set[str] = set()
    for _ in range(4):  # each time all that would come next are there already
        ids = {call_id(7, 0, index, taken) for index in range(8)}
        assert len(ids) == 8 and ids.isdisjoint(taken)
        taken |= ids


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
