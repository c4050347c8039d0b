"""The gateway's side of `response_format`: fields, the checker process, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from parley.v1 import chat_pb2, message_pb2
from parleyd.config import SecuritySettings
from parleyd.errors import EngineFault, InvalidRequest
from parleyd.gateway import checker_process
from parleyd.gateway.grammar_checker import GrammarChecker
from parleyd.generation import ModelInfo
from parleyd.ipc.messages import CheckGrammar
from parleyd.security.api_keys import entry_for, new_key
from tests.integration.conftest import StartGateway
from tests.support import tiny_tokenizer
from tests.support.gateway import GatewayThread
from tests.support.random_engine import info_of
from tests.support.requests import ask, error_info_of, reason_of, violated_fields

FORMATS: list[dict[str, Any]] = [
    {"json_object": {}},
    {"json_schema": '{"type": "integer"}'},
    {"json_schema": "true"},
    {"regex": "[a-z]+"},
    {"grammar": 'root ::= "a" | "b"'},
    {"choice": {"choices": ["yes", "no"]}},
]


def refusal(gateway: GatewayThread, request: chat_pb2.GenerateRequest) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as raised:
        gateway.stub.Generate(request, timeout=60)
    return raised.value


@pytest.mark.parametrize("form", [{"text": {}}, *FORMATS])
def test_every_format_is_taken(gateway: GatewayThread, form: dict[str, Any]) -> None:
    # The scripted worker follows no grammar: what counts is that the request reaches it.
    assert gateway.stub.Generate(ask("hello", response_format=form), timeout=60).choices[0].message.content == "hello"


@pytest.mark.parametrize(
    ("form", "field"),
    [
        ({}, "response_format"),
        ({"json_schema": ""}, "response_format.json_schema"),
        ({"json_schema": "{nope"}, "response_format.json_schema"),
        ({"json_schema": "[]"}, "response_format.json_schema"),
        ({"json_schema": "false"}, "response_format.json_schema"),
        ({"json_schema": '{"not": {}}'}, "response_format.json_schema"),
        (
            {"json_schema": '{"type": "object", "not": {}, "x-guidance": {"lenient": true}}'},
            "response_format.json_schema",
        ),
        ({"json_schema": '{"$ref": "#"}'}, "response_format.json_schema"),
        ({"json_schema": '{"$ref": "http://example.com/schema.json"}'}, "response_format.json_schema"),
        ({"json_schema": '{"items":' * 3000 + "{}" + "}" * 3000}, "response_format.json_schema"),
        ({"json_schema": " " * 65_537}, "response_format.json_schema"),
        ({"regex": ""}, "response_format.regex"),
        ({"regex": "(a"}, "response_format.regex"),
        ({"regex": r"(a)\1"}, "response_format.regex"),
        ({"regex": "a" * 8_193}, "response_format.regex"),
        ({"grammar": ""}, "response_format.grammar"),
        ({"grammar": 'start ::= "a"'}, "response_format.grammar"),
        ({"grammar": 'root ::= "a" other'}, "response_format.grammar"),
        ({"grammar": r'root ::= "\ud800"'}, "response_format.grammar"),
        ({"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000}, "response_format.grammar"),
        ({"choice": {}}, "response_format.choice.choices"),
        ({"choice": {"choices": ["a", ""]}}, "response_format.choice.choices[1]"),
        ({"choice": {"choices": ["a", "b", "a"]}}, "response_format.choice.choices[2]"),
        ({"choice": {"choices": ["a" * 1025]}}, "response_format.choice.choices[0]"),
        ({"choice": {"choices": [str(i) for i in range(1025)]}}, "response_format.choice.choices"),
    ],
)
def test_a_format_that_cannot_be_used_is_an_error_of_its_field(
    gateway: GatewayThread, form: dict[str, Any], field: str
) -> None:
    error = refusal(gateway, ask("x", response_format=form))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert violated_fields(error) == [field]


def test_ids_to_resume_from_must_be_what_the_format_allows(gateway: GatewayThread) -> None:
    form = {"choice": {"choices": ["yes", "no"]}}
    error = refusal(gateway, ask("x", response_format=form, resume={"token_ids": [*b"yeah"]}))
    assert violated_fields(error) == ["resume.token_ids"]
    for ids in ([*b"ye"], [*b"yes", tiny_tokenizer.IM_END_ID]):
        gateway.stub.Generate(ask("!ids 115", response_format=form, resume={"token_ids": ids}), timeout=60)


def test_a_format_is_checked_before_the_model(gateway: GatewayThread) -> None:
    assert violated_fields(refusal(gateway, ask("x", model="other", response_format={"regex": "["}))) == [
        "response_format.regex"
    ]


@pytest.mark.alone
@pytest.mark.parametrize(
    "hostile",
    [
        # Takes minutes; more stack than there is.
        {"json_schema": '{"allOf": [{"multipleOf": 997}, {"multipleOf": 991}, {"multipleOf": 983}]}'},
        {"grammar": "root ::= a0\n" + "".join(f"a{i} ::= a{i + 1} a{i}?\n" for i in range(2400)) + 'a2400 ::= "a"'},
    ],
)
def test_a_hostile_grammar_costs_nobody_else_anything(
    start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch, hostile: dict[str, Any]
) -> None:
    monkeypatch.setattr(checker_process, "_TIMEOUT_S", 1.0)
    gateway = start_gateway(max_running=2)
    gateway.stub.Generate(ask("x", response_format={"regex": "a"}), timeout=60)  # the checker is warm
    doomed = gateway.stub.Generate.future(ask("x", response_format=hostile), timeout=60)
    started = time.monotonic()
    assert gateway.stub.Generate(ask("fine"), timeout=60).choices[0].message.content == "fine"
    assert time.monotonic() - started < 1.0
    assert doomed.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert gateway.stub.Generate(ask("x", response_format={"regex": "b"}), timeout=60).choices


def test_a_tokenizer_that_does_not_spell_bytes_makes_formats_unsupported(
    start_gateway: StartGateway, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tiny_tokenizer.write_tiny_tokenizer(tmp_path_factory.mktemp("words"))
    written = json.loads((folder / "tokenizer.json").read_text())
    written["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": False}
    (folder / "tokenizer.json").write_text(json.dumps(written))
    gateway = start_gateway(folder=folder)
    error = refusal(gateway, ask("x", response_format={"regex": "a"}))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.FAILED_PRECONDITION, "UNSUPPORTED")
    assert error_info_of(error).metadata["field"] == "response_format"
    assert "json_schema" not in gateway.stub.GetModel(chat_pb2.GetModelRequest(), timeout=20).capabilities


def test_a_format_beside_tools_is_refused_unless_none_is_to_be_called(start_gateway: StartGateway) -> None:
    gateway = start_gateway(tool_format="hermes")
    tools = [message_pb2.Tool(name="f")]
    error = refusal(gateway, ask("x", response_format={"regex": "a"}, tools=tools))
    assert (reason_of(error), error_info_of(error).metadata["field"]) == ("UNSUPPORTED", "response_format")
    none = message_pb2.ToolChoice(mode=message_pb2.ToolChoice.MODE_NONE)
    gateway.stub.Generate(ask("x", response_format={"regex": "a"}, tools=tools, tool_choice=none), timeout=60)


def test_what_follows_a_format_is_content_whatever_it_looks_like(start_gateway: StartGateway) -> None:
    gateway = start_gateway(reasoning_format="think")
    text = "<think>x</think>y"
    assert gateway.stub.Generate(ask(text), timeout=60).choices[0].message.content == "y"
    steered = gateway.stub.Generate(ask(text, response_format={"regex": ".*"}), timeout=60)
    assert steered.choices[0].message.content == text


def test_the_model_tells_which_formats_it_can_follow(gateway: GatewayThread) -> None:
    capabilities = gateway.stub.GetModel(chat_pb2.GetModelRequest(), timeout=20).capabilities
    assert {"json_object", "json_schema", "regex", "grammar", "choice"} <= set(capabilities)


async def test_equal_checks_are_made_once_and_outlive_a_caller_that_is_cancelled(tokenizer_folder: Any) -> None:
    checker = GrammarChecker()
    info: ModelInfo = info_of(str(tokenizer_folder), tiny_tokenizer.VOCAB_SIZE, (tiny_tokenizer.IM_END_ID,))
    question = CheckGrammar(info, "regex", "[a-z]+")
    try:
        calls = [asyncio.create_task(checker.check(question)) for _ in range(3)]
        await asyncio.sleep(0)
        calls[0].cancel()
        first, second = await asyncio.gather(*calls[1:])
        assert first and first == second
        assert calls[0].cancelled()
        with pytest.raises(InvalidRequest):
            await checker.check(CheckGrammar(info, "regex", "["))
    finally:
        await checker.close()


ENDLESS = [
    json.dumps({"allOf": [{"multipleOf": 997}, {"multipleOf": 991}, {"multipleOf": 983}, {"minimum": i}]})
    for i in range(6)
]


def test_grammars_of_one_client_do_not_hold_up_anothers(start_gateway: StartGateway, tmp_path: Path) -> None:
    keys = {name: new_key() for name in ("hostile", "other")}
    (tmp_path / "keys.toml").write_text("".join(entry_for(name, key) for name, key in keys.items()))
    gateway = start_gateway(max_running=2, security=SecuritySettings(api_keys=str(tmp_path / "keys.toml")))
    hostile, other = ((("authorization", f"Bearer {key}"),) for key in keys.values())
    gateway.stub.Generate(ask("x", response_format={"regex": "a"}), timeout=60, metadata=other)
    calls = [
        gateway.stub.Generate.future(ask("x", response_format={"json_schema": schema}), timeout=60, metadata=hostile)
        for schema in ENDLESS
    ]
    while gateway.gateway.doorkeeper.num_open < len(calls):
        time.sleep(0.002)
    for call in calls[::2]:
        call.cancel()  # which must not give its client another turn
    for regex in "bcd":
        started = time.monotonic()
        gateway.stub.Generate(ask("x", response_format={"regex": regex}), timeout=30, metadata=other)
        assert time.monotonic() - started < 4.0  # a process starts; one of theirs takes 5 s
    for call in calls:
        call.cancel()


async def test_a_grammar_has_no_more_time_where_the_process_is_new(
    tokenizer_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checker_process, "_TIMEOUT_S", 0.5)
    info = info_of(str(tokenizer_folder), tiny_tokenizer.VOCAB_SIZE, (tiny_tokenizer.IM_END_ID,))
    checker = GrammarChecker()
    try:
        async with asyncio.timeout(20):
            for schema in ENDLESS[:2]:
                with pytest.raises(InvalidRequest, match="too complex"):
                    await checker.check(CheckGrammar(info, "json_schema", schema))
    finally:
        await checker.close()


# Answers the first question, as a checker that has started well, and dies of the second.
SHORT_LIVED = """
import socket, sys
from parleyd.ipc.framing import read_frame, send_frame
from parleyd.ipc.messages import GrammarChecked, encode
sock = socket.socket(fileno=int(sys.argv[1]))
stream = sock.makefile("rb")
read_frame(stream)
send_frame(sock, encode(GrammarChecked(grammar="g")))
read_frame(stream)
"""


@pytest.mark.parametrize(("program", "error"), [(SHORT_LIVED, InvalidRequest), ("import os; os._exit(1)", EngineFault)])
async def test_a_checker_that_dies_refuses_what_it_died_of_and_nothing_for_not_starting(
    program: str, error: type[Exception]
) -> None:
    checker = GrammarChecker((sys.executable, "-c", program))
    for _ in range(3):
        with pytest.raises(error, match="too complex" if error is InvalidRequest else "does not start"):
            await checker.check(CheckGrammar(info_of("none", 1, (0,)), "regex", f"a{_}"))
    await checker.close()
