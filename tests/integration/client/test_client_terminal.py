"""What `parley` shows on a terminal, and a pipe gets as it is."""

from __future__ import annotations

import grpc
import pytest

from parley.v1 import chat_pb2, generation_pb2
from parley_client.cli import main

pytestmark = pytest.mark.usefixtures("server_is_default")

ODD = "\x1b]0;title\x07\x1b[2J\r\b\x7f\x9b\tü\n"
SHOWN = "^[]0;title^G^[[2J^M^H^?<U+009B>\tü\n"


@pytest.mark.parametrize(("is_terminal", "output"), [(True, "\x1b[2mHm\x1b[22m\n\nHello\n"), (False, "Hello\n")])
def test_a_terminal_shows_reasoning_dimmed(server, capsys, monkeypatch, is_terminal, output):
    def answer(request, context):
        yield chat_pb2.GenerateStreamResponse(reasoning_content="Hm")
        yield chat_pb2.GenerateStreamResponse(content="Hello", finish_reason=generation_pb2.FINISH_REASON_STOP)

    server.script["GenerateStream"] = answer
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    assert main(["generate", "Hi"]) == 0
    assert capsys.readouterr().out == output


@pytest.mark.parametrize(("is_terminal", "expected"), [(True, SHOWN), (False, ODD)])
def test_a_terminal_shows_what_would_control_it_and_a_pipe_gets_it_as_it_is(
    server, capsys, monkeypatch, is_terminal, expected
):
    server.says(ODD)
    server.script["GetModel"] = lambda request, context: chat_pb2.GetModelResponse(model=ODD)
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: is_terminal)
    assert main(["generate", "Hi"]) == 0
    assert capsys.readouterr().out == expected + "\n"
    assert main(["model"]) == 0
    assert expected.rstrip() in capsys.readouterr().out
    server.script["GetModel"] = lambda request, context: context.abort(grpc.StatusCode.INTERNAL, "a\x1b[2J")
    assert main(["model"]) == 1
    assert ("\x1b" in capsys.readouterr().err) is not is_terminal


def test_reasoning_cannot_control_a_terminal_either(server, capsys, monkeypatch):
    def answer(request, context):
        yield chat_pb2.GenerateStreamResponse(
            reasoning_content="\x1b[2J", finish_reason=generation_pb2.FINISH_REASON_STOP
        )

    server.script["GenerateStream"] = answer
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["generate", "Hi"]) == 0
    assert capsys.readouterr().out == "\x1b[2m^[[2J\x1b[22m\n"
