"""The gateway's side of `response_format`: fields, the checker process, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from parley.v1 import chat_pb2, generation_pb2, message_pb2
from parleyd.config import SecuritySettings
from parleyd.errors import EngineFault, InvalidRequest, Unsupported
from parleyd.gateway import checker_process, grammar_checker
from parleyd.gateway.grammar_checker import GrammarChecker
from parleyd.ipc.messages import CheckGrammar
from parleyd.security.new_key import entry_for, new_key
from tests.integration.conftest import StartGateway
from tests.support import tiny_tokenizer
from tests.support.eventually import eventually
from tests.support.gateway import GatewayThread
from tests.support.random_engine import info_of
from tests.support.requests import ask, error_info_of, reason_of, violated_fields

StartChecker = Callable[..., GrammarChecker]
RegexOf = Callable[[str], CheckGrammar]
FORMATS: list[dict[str, Any]] = [
    {"json_object": {}},
    {"json_schema": '{"type": "integer"}'},
    {"json_schema": "true"},
    {"regex": "[a-z]+"},
    {"grammar": 'root ::= "a" | "b"'},
    {"choice": {"choices": ["yes", "no"]}},
]
LONGEST: list[dict[str, Any]] = [
    {"json_schema": "true".ljust(65_536)},
    {"regex": "a" * 8_192},
    {"grammar": 'root ::= "a"'.ljust(65_536)},
    {"choice": {"choices": ["a" * 1024]}},
    {"choice": {"choices": [str(i) for i in range(1024)]}},
]


def refusal(gateway: GatewayThread, request: chat_pb2.GenerateRequest) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as raised:
        gateway.stub.Generate(request, timeout=60)
    return raised.value


@pytest.mark.parametrize("form", [{"text": {}}, *FORMATS, *LONGEST])
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
        (
            {"json_schema": '{"oneOf": [{"minimum": 1}, {"type": "null"}], "x-guidance": {"coerce_one_of": true}}'},
            "response_format.json_schema",
        ),
        ({"json_schema": '{"$ref": "#"}'}, "response_format.json_schema"),
        ({"json_schema": '{"$ref": "http://example.com/schema.json"}'}, "response_format.json_schema"),
        ({"json_schema": '{"items":' * 3000 + "{}" + "}" * 3000}, "response_format.json_schema"),
        ({"json_schema": " " * 65_537}, "response_format.json_schema"),
        ({"grammar": 'root ::= "a"'.ljust(65_537)}, "response_format.grammar"),
        ({"regex": ""}, "response_format.regex"),
        ({"regex": "(a"}, "response_format.regex"),
        ({"regex": r"(a)\1"}, "response_format.regex"),
        ({"regex": "a\\"}, "response_format.regex"),
        ({"regex": "a" * 8_193}, "response_format.regex"),
        ({"regex": r"[^\s\S]"}, "response_format.regex"),
        ({"grammar": ""}, "response_format.grammar"),
        ({"grammar": 'start ::= "a"'}, "response_format.grammar"),
        ({"grammar": "root ::= root"}, "response_format.grammar"),
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


def test_formats_know_the_tokens_that_only_the_configuration_names(start_gateway: StartGateway, tmp_path: Path) -> None:
    config_path = tiny_tokenizer.write_tiny_tokenizer(tmp_path) / "tokenizer_config.json"
    config = json.loads(config_path.read_text())
    plain, special = tiny_tokenizer.VOCAB_SIZE, tiny_tokenizer.VOCAB_SIZE + 1
    config["added_tokens_decoder"] = {
        plain: {"content": "yes!", "special": False},
        special: {"content": "no!", "special": True},
    }
    config_path.write_text(json.dumps(config))
    own = start_gateway(folder=tmp_path, worker=("--vocab-size", str(special + 1)))
    form = {"choice": {"choices": ["yes!", "no!"]}}
    response = own.stub.Generate(ask("!ids", response_format=form, resume={"token_ids": [plain]}), timeout=60)
    assert response.choices[0].finish_reason == generation_pb2.FINISH_REASON_STOP
    # A special token is no text.
    error = refusal(own, ask("!ids", response_format=form, resume={"token_ids": [special]}))
    assert violated_fields(error) == ["resume.token_ids"]


def test_tokens_that_the_model_has_no_logit_for_are_in_no_formats_way(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    own = start_gateway(folder=tiny_tokenizer.write_tiny_tokenizer(tmp_path, further_specials=["<|image|>"]))
    response = own.stub.Generate(ask("yes", response_format={"regex": "[a-z]+"}), timeout=60)
    assert response.choices[0].message.content == "yes"


def test_a_format_is_checked_before_the_model(gateway: GatewayThread) -> None:
    assert violated_fields(refusal(gateway, ask("x", model="other", response_format={"regex": "["}))) == [
        "response_format.regex"
    ]


# Takes minutes.
SLOW = '{"allOf": [{"multipleOf": 997}, {"multipleOf": 991}, {"multipleOf": 983}]}'
# Takes more stack than there is.
DEEP = "root ::= a0\n" + "".join(f"a{i} ::= a{i + 1} a{i}?\n" for i in range(2400)) + 'a2400 ::= "a"'


@pytest.mark.parametrize("hostile", [{"json_schema": SLOW}, {"grammar": DEEP}])
def test_a_hostile_grammar_is_refused_and_those_after_it_are_checked(
    start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch, hostile: dict[str, Any]
) -> None:
    gateway = start_gateway()
    gateway.stub.Generate(ask("x", response_format={"regex": "a"}), timeout=60)  # the checker is warm
    monkeypatch.setattr(checker_process, "_TIMEOUT_S", 1.0)
    assert refusal(gateway, ask("x", response_format=hostile)).code() is grpc.StatusCode.INVALID_ARGUMENT
    monkeypatch.undo()
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


# A checker that takes any grammar, answers with how many questions it has had, and dies of one after so many.
COUNTING = """
import socket, sys
from parleyd.ipc.framing import read_frame, send_frame
from parleyd.ipc.messages import GrammarChecked, encode
num_answers, fd = map(int, sys.argv[1:])
sock = socket.socket(fileno=fd)
stream = sock.makefile("rb")
for number in range(num_answers):
    read_frame(stream)
    send_frame(sock, encode(GrammarChecked(grammar=str(number))))
read_frame(stream)
"""


def counting(num_answers: int) -> tuple[str, ...]:
    return sys.executable, "-c", COUNTING, str(num_answers)


@pytest.fixture
async def checkers() -> AsyncIterator[StartChecker]:
    """Starts grammar checkers, and ends them after the test."""
    async with AsyncExitStack() as stack:

        def start(*arguments: Any) -> GrammarChecker:
            checker = GrammarChecker(*arguments)
            stack.push_async_callback(checker.close)
            return checker

        yield start


@pytest.fixture
def regex_of(tokenizer_folder: Path) -> RegexOf:
    info = info_of(str(tokenizer_folder), tiny_tokenizer.VOCAB_SIZE, (tiny_tokenizer.IM_END_ID,))
    return partial(CheckGrammar, info, "regex")


def children() -> set[psutil.Process]:
    return set(psutil.Process().children())


def suspend(process: psutil.Process) -> None:
    process.suspend()
    eventually(lambda: process.status() == psutil.STATUS_STOPPED)


async def until_asked() -> None:
    """Gives a check that was begun just now the few passes of the event loop that it takes to ask a process."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_equal_checks_are_made_once_and_outlive_a_caller_that_is_cancelled(
    checkers: StartChecker, regex_of: RegexOf
) -> None:
    checker = checkers(counting(9))
    before = children()
    assert await checker.check(regex_of("a")) == "1"  # 0 was the first question of a process, which is ours
    (process,) = children() - before
    suspend(process)
    calls = [asyncio.create_task(checker.check(regex_of("b"))) for _ in range(3)]
    await until_asked()
    calls[0].cancel()
    process.resume()
    assert await asyncio.gather(*calls[1:]) == ["2", "2"]
    assert calls[0].cancelled()
    assert await checker.check(regex_of("c")) == "3"


def test_grammars_of_one_client_do_not_hold_up_anothers(
    start_gateway: StartGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checker_process, "_TIMEOUT_S", 3600.0)  # who has to wait for theirs has no answer here
    keys = {name: new_key() for name in ("hostile", "other")}
    (tmp_path / "keys.toml").write_text("".join(entry_for(name, key) for name, key in keys.items()))
    gateway = start_gateway(max_running=2, security=SecuritySettings(api_keys=str(tmp_path / "keys.toml")))
    hostile, other = ((("authorization", f"Bearer {key}"),) for key in keys.values())
    gateway.stub.Generate(ask("x", response_format={"regex": "a"}), timeout=60, metadata=other)
    calls = [
        gateway.stub.Generate.future(ask("x", response_format={"json_schema": schema}), metadata=hostile)
        for schema in (SLOW + " " * i for i in range(6))
    ]
    while gateway.gateway.doorkeeper.num_open < len(calls):
        time.sleep(0.002)
    for call in calls[::2]:
        call.cancel()  # which must not give its client another turn
    for regex in "bcd":
        gateway.stub.Generate(ask("x", response_format={"regex": regex}), timeout=60, metadata=other)
    gateway.stub.Generate(ask("x"), timeout=60, metadata=other)
    assert not any(call.done() for call in calls[1::2])
    for call in calls:
        call.cancel()


async def test_a_grammar_has_no_more_time_where_the_process_is_new(
    checkers: StartChecker, regex_of: RegexOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checker_process, "_TIMEOUT_S", 0.5)
    checker = checkers()
    async with asyncio.timeout(40):  # a start may take 60
        for schema in (SLOW, SLOW + " "):
            with pytest.raises(InvalidRequest, match="too complex"):
                await checker.check(CheckGrammar(regex_of("").info, "json_schema", schema))


@pytest.mark.parametrize(
    ("command", "error", "text"),
    [
        (counting(1), InvalidRequest, "too complex"),
        ((sys.executable, "-c", "import os; os._exit(1)"), EngineFault, "does not start"),
        (("/nothing",), EngineFault, "cannot be started: .*No such file"),
    ],
)
async def test_a_checker_that_dies_refuses_what_it_died_of_and_nothing_for_not_starting(
    checkers: StartChecker, regex_of: RegexOf, command: tuple[str, ...], error: type[Exception], text: str
) -> None:
    checker = checkers(command)
    for regex in "abc":
        with pytest.raises(error, match=text):
            await checker.check(regex_of(regex))


async def test_what_a_checker_dies_of_that_was_asked_others_before_is_asked_of_a_new_one(
    checkers: StartChecker, regex_of: RegexOf
) -> None:
    checker = checkers(counting(2))
    assert [await checker.check(regex_of(regex)) for regex in "abc"] == ["1", "1", "1"]


async def test_a_checker_that_is_killed_while_it_has_nothing_to_do_costs_no_grammar_its_check(
    checkers: StartChecker, regex_of: RegexOf
) -> None:
    checker = checkers()
    for regex in "abc":
        before = children()
        assert await checker.check(regex_of(regex))
        (process,) = children() - before
        process.kill()


async def test_too_complex_is_remembered_for_a_while_only(
    checkers: StartChecker, regex_of: RegexOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    checker = checkers()
    for regex, doubtful_after_s in (("b", 3600.0), ("c", 0.0)):
        before = children()
        await checker.check(regex_of("a" + regex))
        (process,) = children() - before
        suspend(process)
        monkeypatch.setattr(grammar_checker, "_DOUBTFUL_AFTER_S", doubtful_after_s)
        monkeypatch.setattr(checker_process, "_TIMEOUT_S", 0.5)
        with pytest.raises(InvalidRequest, match="too complex"):
            await checker.check(regex_of(regex))
        monkeypatch.undo()
    with pytest.raises(InvalidRequest, match="too complex"):
        await checker.check(regex_of("b"))
    assert await checker.check(regex_of("c"))


async def test_a_tokenizer_that_could_not_be_read_is_asked_for_again_after_a_while(
    checkers: StartChecker, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checker = checkers()
    info = info_of(str(tmp_path), tiny_tokenizer.VOCAB_SIZE, (tiny_tokenizer.IM_END_ID,))
    for regex, doubtful_after_s in (("b", 3600.0), ("c", 0.0)):
        monkeypatch.setattr(grammar_checker, "_DOUBTFUL_AFTER_S", doubtful_after_s)
        with pytest.raises(Unsupported):
            await checker.check(CheckGrammar(info, "regex", regex))
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    with pytest.raises(Unsupported):
        await checker.check(CheckGrammar(info, "regex", "b"))
    assert await checker.check(CheckGrammar(info, "regex", "c"))


async def test_a_gateway_that_was_stopped_itself_finds_no_grammar_too_complex(
    checkers: StartChecker, regex_of: RegexOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    checker = checkers()
    await checker.check(regex_of("a"))
    monkeypatch.setattr(checker_process, "_TIMEOUT_S", 2.0)
    call = asyncio.create_task(checker.check(regex_of("b")))
    await until_asked()
    time.sleep(2.5)  # noqa: ASYNC251 - the event loop stands still, as if the process were stopped
    assert await call
