"""`<tool_call>{"name": …, "arguments": {…}}</tool_call>`: Hermes 2 Pro and 3, Qwen 2.5 and 3."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from parleyd.text.tool_format.tool_format import Spelling, ToolFormat

HERMES = ToolFormat(
    name="hermes",
    opening="<tool_call>",
    closing="</tool_call>",
    spelling=Spelling("\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"),
)

# What Qwen 2.5's template tells the model.
_INSTRUCTIONS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def spell_out(messages: Sequence[Mapping[str, Any]], tools: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation for a chat template that knows no tools: they are described in the system message, calls
    are an assistant's text, and results a user's."""
    spelled = [_spell_message(message) for message in messages]
    if descriptions := "\n".join(_to_json(tool) for tool in tools):
        if spelled[0]["role"] != "system":
            spelled.insert(0, {"role": "system", "content": ""})
        instructions = _INSTRUCTIONS.format(tools=descriptions)
        spelled[0]["content"] = "\n\n".join(filter(None, (spelled[0]["content"], instructions)))
    return _merge_results(spelled)


def _spell_message(message: Mapping[str, Any]) -> dict[str, Any]:
    calls = [
        f"<tool_call>\n{_to_json(call['function'])}\n</tool_call>"  # a name and arguments, in this order
        for call in message.get("tool_calls", ())
    ]
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": "\n".join(filter(None, (message["content"], *calls)))}


def _merge_results(messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results as user messages; those that follow each other are one, as templates want turns to alternate."""
    merged: list[dict[str, Any]] = []
    was_result = False
    for message in messages:
        is_result = message["role"] == "tool"
        if is_result:
            message = {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
        if is_result and was_result:
            merged[-1]["content"] += "\n" + message["content"]
        else:
            merged.append(message)
        was_result = is_result
    return merged


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
