"""Tools, and gateways for chat templates of several families, whose model writes what it is told to."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from parley.v1 import chat_pb2, generation_pb2, message_pb2
from tests.support import tiny_tokenizer, tool_templates
from tests.support.gateway import GatewayThread, scripted_command, scripted_settings
from tests.support.tiny_tokenizer import CHATML_TEMPLATE, write_tiny_tokenizer

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = message_pb2.Tool(name="get_weather", description="Tells the weather.", parameters=json.dumps(SCHEMA))
CLOCK = message_pb2.Tool(name="get_time")
TOOLS = [WEATHER, CLOCK]
BERN = '{"city": "Bern \\u2764 <ok>"}'
MODE = message_pb2.ToolChoice.Mode
REQUIRED = message_pb2.ToolChoice(mode=MODE.MODE_REQUIRED)
JSON_OBJECT = generation_pb2.ResponseFormat(json_object=generation_pb2.JsonObjectFormat())

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen": {"template": tool_templates.QWEN},
    "llama": {"template": tool_templates.LLAMA},
    "mistral": {"template": tool_templates.MISTRAL, "specials": ["[TOOL_CALLS]"]},
    "mistral11": {"template": tool_templates.MISTRAL11, "specials": ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"]},
    "chatml": {"template": CHATML_TEMPLATE, "settings": {"tool_format": "hermes"}},
    "thinking": {"template": tool_templates.QWEN_REASONING},
    "opened": {"template": tool_templates.OPENED_REASONING},
    "opened with tools": {
        "template": tool_templates.QWEN.removesuffix("{%- endif %}\n") + "{{- '<think>\n' }}{%- endif %}"
    },
    "opened but after results": {
        "template": tool_templates.QWEN.removesuffix("{%- endif %}\n")
        + "{{- '<think>\n' if messages[-1].role != 'tool' }}{%- endif %}"
    },
}
# Mistral's markers are tokens of their own, and special.
SPECIAL_IDS = {b"[TOOL_CALLS]": tiny_tokenizer.VOCAB_SIZE, b"[ARGS]": tiny_tokenizer.VOCAB_SIZE + 1}


class Families(dict[str, GatewayThread]):
    """Gateways by family, each started when it is first asked for; its tokenizer is in the folder of its name."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        super().__init__()
        self.folder = folder
        self._stack = stack

    def __missing__(self, name: str) -> GatewayThread:
        family = FAMILIES[name]
        specials = family.get("specials", ())
        folder = write_tiny_tokenizer(self.folder / name, chat_template=family["template"], further_specials=specials)
        vocab_size = str(tiny_tokenizer.VOCAB_SIZE + len(specials))
        command = scripted_command(folder, "--step-delay", "0.001", "--vocab-size", vocab_size)
        settings = scripted_settings(**family.get("settings", {}))
        self[name] = self._stack.enter_context(GatewayThread(settings, command))
        return self[name]


def spell(family: str, name: str, arguments: str) -> str:
    """A call as a model of the family writes it."""
    if family == "llama":
        return f'{{"name": "{name}", "parameters": {arguments}}}'
    if family == "mistral11":
        return f"[TOOL_CALLS]{name}[ARGS]{arguments}"
    if family == "mistral":
        return f'[TOOL_CALLS] [{{"name": "{name}", "arguments": {arguments}}}]'
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def saying(family: str, text: str) -> str:
    """A message to which the model answers with this text."""
    if not family.startswith("mistral"):
        return f"«{text}»"
    ids = b" ".join(b"%d" % byte for byte in text.encode()).decode()
    for marker, token_id in SPECIAL_IDS.items():
        ids = ids.replace(" ".join(map(str, marker)), str(token_id))
    return f"«!ids {ids}»"


def whole(responses: list[chat_pb2.GenerateStreamResponse]) -> message_pb2.Message:
    """The message that a stream's deltas add up to."""
    message = message_pb2.Message(role=message_pb2.ROLE_ASSISTANT)
    for response in responses:
        message.content += response.content
        message.reasoning_content += response.reasoning_content
        for delta in response.tool_calls:
            if delta.index == len(message.tool_calls):
                assert delta.id and delta.name
                message.tool_calls.add(id=delta.id, name=delta.name)
            else:
                assert (delta.id, delta.name) == ("", "")
            message.tool_calls[delta.index].arguments += delta.arguments
    return message


def conversation(call_id: str) -> list[message_pb2.Message]:
    call = message_pb2.ToolCall(id=call_id, name="get_weather", arguments='{"city": "Bern"}')
    return [
        message_pb2.Message(role=message_pb2.ROLE_USER, content="Weather in Bern?"),
        message_pb2.Message(role=message_pb2.ROLE_ASSISTANT, tool_calls=[call]),
        message_pb2.Message(role=message_pb2.ROLE_TOOL, content="sunny", tool_call_id=call_id),
    ]
