"""What is found out about a model from its chat template and vocabulary, and how messages are spelled out for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parleyd.text.answer_format import AnswerFormat
from parleyd.text.chat_template import ChatTemplate
from parleyd.text.tokenizer import Tokenizer
from tests.support import tool_templates
from tests.support.tiny_tokenizer import CHATML_TEMPLATE, write_tiny_tokenizer

WEATHER = {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": {}}}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}


def find(
    folder: Path,
    template: str | None,
    *,
    tool_format: str = "auto",
    reasoning_format: str = "auto",
    specials: tuple[str, ...] = (),
) -> AnswerFormat:
    write_tiny_tokenizer(folder, chat_template=template, further_specials=specials)
    return AnswerFormat.find(
        ChatTemplate.load(folder), Tokenizer.load(folder), tool_format=tool_format, reasoning_format=reasoning_format
    )


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (tool_templates.QWEN, "hermes"),
        (tool_templates.LLAMA, "llama3"),
        (tool_templates.MISTRAL, "mistral"),
        (tool_templates.MISTRAL11, "mistral11"),
        (tool_templates.MISTRAL11.replace("'[ARGS]'", "'[CALL_ID]' + tool_call.id + '[ARGS]'"), "mistral11"),
    ],
)
def test_the_tool_format_is_the_one_the_template_writes(tmp_path: Path, template: str, name: str) -> None:
    found = find(tmp_path, template)
    assert found.tool_format is not None and found.tool_format.name == name
    assert not found.spells_out_tools


# Qwen 3 Coder's calls: tools are told, but in no format of ours.
OTHER_FORMAT = (
    "{{ tools | tojson if tools }}{% for message in messages %}{{ message.content }}"
    "{% for call in message.tool_calls %}<tool_call>\n<function={{ call.function.name }}>"
    "\n</function>\n</tool_call>{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "setting", "why"),
    [
        (CHATML_TEMPLATE, "auto", "knows no tools"),
        (CHATML_TEMPLATE, "mistral", "knows no tools"),
        (None, "auto", "knows no tools"),
        (tool_templates.QWEN, "none", "--tool-format none"),
        (OTHER_FORMAT, "auto", "not known how"),
    ],
)
def test_without_a_template_or_format_there_are_no_tools(
    tmp_path: Path, template: str | None, setting: str, why: str
) -> None:
    found = find(tmp_path, template, tool_format=setting)
    assert found.tool_format is None
    assert why in found.no_tools_because


def test_the_setting_overrules_what_would_be_found(tmp_path: Path) -> None:
    found = find(tmp_path, OTHER_FORMAT, tool_format="hermes")
    assert found.tool_format is not None and not found.spells_out_tools


@pytest.mark.parametrize(
    ("template", "specials", "setting", "has_reasoning"),
    [
        (tool_templates.QWEN_REASONING, (), "auto", True),
        (tool_templates.OPENED_REASONING, (), "auto", True),
        (tool_templates.QWEN_REASONING, (), "none", False),
        (CHATML_TEMPLATE, (), "auto", False),
        (CHATML_TEMPLATE, ("<think>", "</think>"), "auto", True),
        (CHATML_TEMPLATE, (), "think", True),
    ],
)
def test_reasoning_is_found_in_template_or_vocabulary(
    tmp_path: Path, template: str, specials: tuple[str, ...], setting: str, has_reasoning: bool
) -> None:
    assert find(tmp_path, template, reasoning_format=setting, specials=specials).has_reasoning == has_reasoning


@pytest.mark.parametrize(
    ("prompt", "continued", "opens"),
    [
        ("<|im_start|>assistant\n", "", False),
        ("<|im_start|>assistant\n<think>\n", "", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "", False),
        ("<|im_start|>user\n<think>\n<|im_end|>\n<|im_start|>assistant\n", "", False),
        ("<|im_start|>assistant\n<think>\nLet me", "<think>\nLet me", True),
        ("<|im_start|>assistant\n\n<think>\nLet me", "\n<think>\nLet me", True),
        ("<|im_start|>assistant\n<think>\nLet me</think> So", "<think>\nLet me</think> So", False),
    ],
)
def test_an_answer_may_begin_amid_reasoning(tmp_path: Path, prompt: str, continued: str, opens: bool) -> None:
    assert find(tmp_path, tool_templates.QWEN_REASONING).opens_reasoning(prompt, continued) == opens


def test_a_template_that_knows_no_tools_is_told_in_messages(tmp_path: Path) -> None:
    found = find(tmp_path, CHATML_TEMPLATE, tool_format="hermes")
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Hm.", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "sunny", "tool_call_id": "abcdefghi"},
        {"role": "tool", "content": "rainy", "tool_call_id": "abcdefghi"},
    ]
    spelled, tools = found.for_template(messages, [WEATHER])
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
    assert tools is None
    assert [message["role"] for message in spelled] == ["system", "user", "assistant", "user"]
    assert '"description": "Tells it."' in spelled[0]["content"]
    assert spelled[2] == {"role": "assistant", "content": f"Hm.\n{call}\n{call}"}
    assert spelled[3]["content"] == (
        "<tool_response>\nsunny\n</tool_response>\n<tool_response>\nrainy\n</tool_response>"
    )


def test_spelled_out_tools_read_as_in_a_template_that_knows_them(tmp_path: Path) -> None:
    """ChatML with the tools in its messages is Qwen's own rendering."""
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny"},
    ]
    spelled, _ = find(tmp_path / "chatml", CHATML_TEMPLATE, tool_format="hermes").for_template(messages, [WEATHER])
    by_messages = ChatTemplate(CHATML_TEMPLATE, {}).render(spelled)
    assert by_messages == ChatTemplate(tool_templates.QWEN, {}).render(messages, tools=[WEATHER])


def test_without_tools_the_conversation_stays_as_it_is(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    assert find(tmp_path, CHATML_TEMPLATE, tool_format="hermes").for_template(messages, []) == (messages, None)
