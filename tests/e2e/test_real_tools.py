"""Tools with the real embedded model, whose chat template knows none."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from parley.v1 import chat_pb2, generation_pb2, message_pb2
from tests.support.requests import ask, error_info_of
from tests.support.served import ServedProcess

ROOT = Path(__file__).parents[2]

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS = [
    message_pb2.Tool(name="get_weather", description="Tells the weather in a city.", parameters=json.dumps(SCHEMA)),
    message_pb2.Tool(name="get_time", description="Tells the time."),
]
REQUIRED = message_pb2.ToolChoice(mode=message_pb2.ToolChoice.MODE_REQUIRED)


@pytest.fixture(scope="module")
def with_tools() -> Iterator[ServedProcess]:
    with ServedProcess("--tool-format", "hermes", "--dtype", "float32", "--drain-delay", "0") as process:
        process.wait_health()
        yield process


def test_the_embedded_models_template_knows_no_tools(served: ServedProcess) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        served.stub.Generate(ask("Weather in Bern?", tools=TOOLS), timeout=60)
    assert raised.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert error_info_of(raised.value).metadata["field"] == "tools"


@pytest.mark.parametrize("seed", range(3))
def test_required_calls_are_valid_however_the_model_draws(with_tools: ServedProcess, seed: int) -> None:
    request = ask(
        "What is the weather in Bern?",
        tools=TOOLS,
        tool_choice=REQUIRED,
        seed=seed,
        temperature=1.5,
        max_new_tokens=200,
    )
    choice = with_tools.stub.Generate(request, timeout=120).choices[0]
    calls = list(choice.message.tool_calls)
    assert calls and choice.message.content == ""
    for call in calls if choice.finish_reason == generation_pb2.FINISH_REASON_TOOL_CALLS else calls[:-1]:
        arguments = json.loads(call.arguments)
        if call.name == "get_time":
            assert arguments == {}
        else:
            assert call.name == "get_weather"
            assert arguments.keys() == {"city", "unit"} and arguments["unit"] in ("celsius", "fahrenheit")


def test_a_named_tool_is_called_and_resumed_in_its_middle(with_tools: ServedProcess) -> None:
    choice = message_pb2.ToolChoice(name="get_weather")
    request = ask("What is the weather in Bern?", tools=TOOLS, tool_choice=choice, max_new_tokens=100)
    whole = with_tools.stub.Generate(request, timeout=120).choices[0]
    assert whole.finish_reason == generation_pb2.FINISH_REASON_TOOL_CALLS
    [call] = whole.message.tool_calls
    assert call.name == "get_weather"
    cut = len(whole.token_ids) // 2
    request.resume.token_ids.extend(whole.token_ids[:cut])
    rest: chat_pb2.Choice = with_tools.stub.Generate(request, timeout=120).choices[0]
    assert list(rest.token_ids) == list(whole.token_ids[cut:])
    assert call.arguments.endswith("".join(piece.arguments for piece in rest.message.tool_calls))


def test_the_example_in_the_docs_runs(with_tools: ServedProcess) -> None:
    [example] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/tools.md").read_text(), re.DOTALL)
    example = example.replace("localhost:50051", with_tools.target)
    result = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=100, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("get_weather {'city': ")
