"""The `parley` command against a server."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import pytest
from google.protobuf import json_format
from grpc_health.v1 import health_pb2

from parley.v1 import chat_pb2, generation_pb2, message_pb2
from parley_client import Client, Stream
from parley_client.cli import main

pytestmark = pytest.mark.usefixtures("server_is_default")


@pytest.fixture
def parley(server):
    """Starts `parley` as a process of its own, with pipes."""
    started = []

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, "-m", "parley_client", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_generate_prints_the_text(server, capsys):
    server.says("Hello", " there")
    assert main(["generate", "Hi", "--system", "Be kind."]) == 0
    assert capsys.readouterr() == ("Hello there\n", "")
    sent = [(message.role, message.content) for message in server.requests[-1].messages]
    assert sent == [(message_pb2.ROLE_SYSTEM, "Be kind."), (message_pb2.ROLE_USER, "Hi")]


def test_generate_streams_the_text_as_it_is_made(server, parley):
    go_on = threading.Event()

    def answer(request, context):
        yield chat_pb2.GenerateStreamResponse(content="Hello")
        assert go_on.wait(20)
        yield chat_pb2.GenerateStreamResponse(content=" there", finish_reason=generation_pb2.FINISH_REASON_STOP)

    server.script["GenerateStream"] = answer
    process = parley("generate", "Hi")
    assert process.stdout.read(5) == b"Hello"
    go_on.set()
    assert process.communicate() == (b" there\n", b"")
    assert process.returncode == 0


def test_generate_reads_the_prompt_from_stdin(server, parley):
    server.says("Hello")
    process = parley("generate", "-")
    assert process.communicate("Grüße\n".encode()) == (b"Hello\n", b"")
    assert server.requests[-1].messages[0].content == "Grüße\n"


def test_generate_as_json_prints_the_whole_answer_as_protobufs_json(server, capsys):
    server.says("Hello", " there")
    assert main(["generate", "Hi", "--json"]) == 0
    output, _ = capsys.readouterr()
    answer = json.loads(output)
    assert answer["choices"][0]["message"]["content"] == "Hello there"
    assert answer["usage"]["prompt_tokens"] == 7
    assert json_format.ParseDict(answer, chat_pb2.GenerateResponse()).seed == 2**63


def test_flags_become_generation_options(server, capsys):
    server.says("x")
    flags = "--max-new-tokens 5 --temperature 0 --top-p 0.5 --top-k 3 --min-p 0.25 --repetition-penalty 1.5 --seed 7 "
    flags += "--presence-penalty 0.5 --frequency-penalty -0.5"
    main(["generate", "Hi", "--model", "scripted", "--stop", "a", "--stop", "b", *flags.split()])
    assert server.requests[-1].model == "scripted"
    assert server.requests[-1].generation_config == generation_pb2.GenerationConfig(
        max_new_tokens=5,
        temperature=0,
        top_p=0.5,
        top_k=3,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        seed=7,
        stop_strings=["a", "b"],
    )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], None),
        (["--json-object"], generation_pb2.ResponseFormat(json_object={})),
        (["--json-schema", "FILE"], generation_pb2.ResponseFormat(json_schema='{"type": "object"}')),
        (["--regex", "[a-z]+"], generation_pb2.ResponseFormat(regex="[a-z]+")),
        (["--grammar", "FILE"], generation_pb2.ResponseFormat(grammar='{"type": "object"}')),
        (["--choice", "yes", "--choice", "no"], generation_pb2.ResponseFormat(choice={"choices": ["yes", "no"]})),
    ],
)
def test_flags_say_what_form_the_answer_takes(server, tmp_path, flags, expected):
    file = tmp_path / "file"
    file.write_text('{"type": "object"}')
    server.says("x")
    assert main(["generate", "Hi", *(str(file) if flag == "FILE" else flag for flag in flags)]) == 0
    sent = server.requests[-1]
    assert (sent.response_format if sent.HasField("response_format") else None) == expected


def test_forms_exclude_each_other_and_a_file_that_is_not_there_is_wrong_usage(server, capsys):
    for flags in (["--json-object", "--regex", "a"], ["--json-schema", "/nowhere"]):
        with pytest.raises(SystemExit) as error:
            main(["generate", "Hi", *flags])
        assert error.value.code == 2
    assert "/nowhere cannot be read" in capsys.readouterr().err


def test_model_tells_what_is_served(server, capsys):
    defaults = generation_pb2.GenerationConfig(top_k=20)
    served = chat_pb2.GetModelResponse(model="scripted", default_generation_config=defaults, capabilities=["chat"])
    server.script["GetModel"] = lambda request, context: served
    assert main(["model"]) == 0
    text, _ = capsys.readouterr()
    assert "model:               scripted\n" in text
    assert "generation defaults: top_k=20\n" in text
    assert main(["model", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["default_generation_config"]["top_k"] == 20


@pytest.mark.parametrize("status", health_pb2.HealthCheckResponse.ServingStatus.keys())
def test_health_exits_with_0_only_when_serving(server, capsys, status):
    server.is_serving(health_pb2.HealthCheckResponse.ServingStatus.Value(status))
    expected = 0 if status == "SERVING" else 1
    assert main(["health"]) == expected
    assert capsys.readouterr().out == f"{status}\n"
    assert main(["health", "--json"]) == expected
    assert json.loads(capsys.readouterr().out) == {"status": status}


@pytest.mark.parametrize("command", [["generate", "Hi"], ["generate", "Hi", "--json"], ["model"], ["health"], ["chat"]])
def test_a_failure_is_one_line_and_exit_code_1(parley, command):
    process = parley(*command, "--target", "localhost:1")
    output, errors = process.communicate(b"Hi\n")
    assert (process.returncode, output) == (1, b"")
    assert errors.startswith(b"parley: error: connection failed: ")
    assert errors.count(b"\n") == 1


def test_a_failure_in_mid_answer_stands_on_its_own_line(server, capsys):
    def break_off(request, context):
        yield chat_pb2.GenerateStreamResponse(content="Hel")
        context.abort(grpc.StatusCode.INTERNAL, "internal\nerror")

    server.script["GenerateStream"] = break_off
    assert main(["generate", "Hi"]) == 1
    assert capsys.readouterr() == ("Hel\n", "parley: error: internal error\n")


def test_input_that_is_no_text_is_an_invalid_request(server, parley):
    process = parley("generate", "-")
    _, errors = process.communicate(b"\xff")
    assert process.returncode == 1
    assert errors.startswith(b"parley: error: invalid request: messages[0].content: is no valid text")


def test_a_reader_that_goes_away_ends_generate_quietly(server, parley):
    def answer(request, context):
        while context.is_active():
            yield chat_pb2.GenerateStreamResponse(content="x" * 10_000)

    server.script["GenerateStream"] = answer
    process = parley("generate", "Hi")
    process.stdout.read(5)
    process.stdout.close()
    assert server.has_seen_the_end()
    assert process.wait() == 1
    assert process.stderr.read() == b""


def test_ctrl_c_ends_generate_quietly(server, parley):
    def answer(request, context):
        yield chat_pb2.GenerateStreamResponse(content="Hello")
        server.hold(context)

    server.script["GenerateStream"] = answer
    process = parley("generate", "Hi")
    assert process.stdout.read(5) == b"Hello"
    process.send_signal(signal.SIGINT)
    assert server.has_seen_the_end()
    assert process.communicate() == (b"\n", b"")
    assert process.returncode == 130


def test_a_ctrl_c_amid_the_imports_ends_quietly(tmp_path):
    (tmp_path / "grpc.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    command = [Path(sys.executable).parent / "parley", "model"]
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


@pytest.mark.parametrize(
    ("arguments", "kind", "method"),
    [
        (["generate", "Hi"], Client, "stream"),
        (["generate", "Hi"], Stream, "__next__"),
        (["generate", "Hi"], Stream, "cancel"),
        (["generate", "Hi"], Client, "close"),
        (["generate", "Hi", "--json"], Client, "chat"),
        (["chat"], Client, "stream"),
        (["chat"], Client, "close"),
        (["model"], Client, "model_info"),
        (["model"], Client, "close"),
        (["health"], Client, "health"),
        (["health"], Client, "close"),
    ],
)
def test_where_ctrl_c_strikes_nobody_is_within_grpc(server, monkeypatch, capsys, arguments, kind, method):
    # gRPC's locks do not survive a KeyboardInterrupt in their midst, and that is raised in the main thread.
    callers = set()
    call = getattr(kind, method)

    def note_caller(*args, **kwargs):
        callers.add(threading.current_thread())
        return call(*args, **kwargs)

    monkeypatch.setattr(kind, method, note_caller)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    server.says("Hello", " there")
    server.script["GetModel"] = lambda request, context: chat_pb2.GetModelResponse(model="scripted")
    server.is_serving(health_pb2.HealthCheckResponse.SERVING)
    assert main(arguments) == 0
    assert capsys.readouterr().out
    assert callers and threading.main_thread() not in callers


def test_chat_over_a_pipe_keeps_the_history(server, parley):
    server.says("Hello", " there")
    process = parley("chat", "--system", "Be kind.")
    output, errors = process.communicate(b"One\n\nTwo\n/reset\nThree\n/exit\nFour\n")
    assert (process.returncode, output, errors) == (0, b"Hello there\n" * 3, b"")
    said = [[message.content for message in request.messages] for request in server.requests]
    assert said == [["Be kind.", "One"], ["Be kind.", "One", "Hello there", "Two"], ["Be kind.", "Three"]]


def test_ctrl_c_stops_the_answer_and_not_the_chat(server, parley):
    def answer(request, context):
        if len(server.requests) == 1:
            yield chat_pb2.GenerateStreamResponse(content="Hello")
            server.hold(context)
        yield chat_pb2.GenerateStreamResponse(content="Bye", finish_reason=generation_pb2.FINISH_REASON_STOP)

    server.script["GenerateStream"] = answer
    process = parley("chat")
    process.stdin.write(b"One\n")
    process.stdin.flush()
    assert process.stdout.read(5) == b"Hello"
    process.send_signal(signal.SIGINT)
    assert server.has_seen_the_end()
    assert process.communicate(b"Two\n") == (b"\nBye\n", b"")
    assert process.returncode == 0
    assert [message.content for message in server.requests[-1].messages] == ["One", "Hello", "Two"]


def test_chat_on_a_terminal_goes_on_after_an_error_and_after_ctrl_c(server, monkeypatch, capsys):
    lines = iter(["One", "Two", KeyboardInterrupt, EOFError])

    def type_line(prompt):
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    def answer(request, context):
        if len(server.requests) == 1:
            server.fails(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", message="the queue is full")
        yield chat_pb2.GenerateStreamResponse(content="Hello", finish_reason=generation_pb2.FINISH_REASON_STOP)

    server.script["GenerateStream"] = answer
    monkeypatch.setattr("builtins.input", type_line)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert main(["chat"]) == 0
    output, errors = capsys.readouterr()
    assert errors == "parley: error: the queue is full\n"
    assert output == "Hello\n\n(Ctrl-D or /exit quits)\n\n"
    assert [message.content for message in server.requests[-1].messages] == ["Two"]


@pytest.mark.parametrize("arguments", [["generate", "Hi"], ["--help"], ["--version"]], ids=" ".join)
def test_an_output_that_cannot_be_written_is_one_line(server, monkeypatch, arguments):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    server.says("Hello")
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "parley_client", *arguments]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("parley: error: the output cannot be written")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("command", ["generate Hi", "generate Hi --json", "generate -", "chat"])
def test_standard_streams_that_are_closed_are_as_good_as_empty(server, command, closed):
    server.says("Hello")
    line = f'exec "$0" -m parley_client {command} {closed}'
    result = subprocess.run(
        ["sh", "-c", line, sys.executable],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "Hi", "there"], "parley generate: error: unrecognized arguments: there (see "),
        (["model", "--api-key", "parley_x"], "parley model: error: unrecognized arguments: --api-key parley_x (see "),
        (["generate", "Hi", "--top-k", "many"], "parley generate: error: argument --top-k: "),
        ([], "parley: error: the following arguments are required: COMMAND (see parley --help)"),
    ],
)
def test_wrong_usage_is_one_line_that_names_the_help(capsys, arguments, said):
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(said) and " --help)" in error


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as raised:
        main(["--version"])
    assert raised.value.code == 0
    assert re.fullmatch(r"parley \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_what_a_flag_can_mend_names_the_flag(server, capsys):
    assert main(["generate", "Hi", "--target", "localhost:1", "--timeout", "3"]) == 1
    assert "(does a server listen at localhost:1, in plain text? --target names another)" in capsys.readouterr().err
    server.script["GenerateStream"] = lambda request, context: server.hold(context)
    assert main(["generate", "Hi", "--timeout", "0.5"]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.endswith("(--timeout is 0.5 s)")


@pytest.mark.parametrize(("command", "method"), [("generate Hi", "GenerateStream"), ("model", "GetModel")])
def test_a_timeout_tells_what_was_waited_for(server, capsys, command, method):
    def load_for_ever(request, context):
        if len(server.requests) > 4:  # first tries, and one more
            server.hold(context)
        server.fails(context, grpc.StatusCode.UNAVAILABLE, "NOT_READY", message="the model is still loading")

    server.script[method] = load_for_ever
    assert main([*command.split(), "--timeout", "3"]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.endswith("(--timeout is 3 s; before that: the model is still loading)")
