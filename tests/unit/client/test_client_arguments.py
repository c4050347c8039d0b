"""The arguments of the `parley` command."""

from __future__ import annotations

import pytest

from parley_client.cli import build_parser, main

COMMANDS = [["chat"], ["generate", "Hi"], ["batch", "in.jsonl", "out.jsonl"], ["model"], ["health"]]


@pytest.mark.parametrize("command", [[], *COMMANDS])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("usage: parley")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["sing"],
        ["generate"],
        ["chat", "--json"],
        ["generate", "Hi", "--top-k", "many"],
        ["generate", "Hi", "--top-logprobs", "3"],
        ["generate", "Hi", "--timeout", "0"],
        ["generate", "Hi", "--timeout", "nan"],
        ["health", "--timeout", "soon"],
        ["batch", "in.jsonl"],
        ["batch", "-", "out.jsonl"],
        ["batch", "in.jsonl", "-"],
        ["batch", "in.jsonl", "out.jsonl", "--chunk", "0"],
        ["batch", "in.jsonl", "out.jsonl", "--chunk", "1025"],
    ],
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_the_target_is_the_flag_else_the_environment_else_localhost(command, monkeypatch):
    monkeypatch.delenv("PARLEY_TARGET", raising=False)
    assert build_parser().parse_args(command).target == "localhost:50051"
    monkeypatch.setenv("PARLEY_TARGET", "elsewhere:1")
    assert build_parser().parse_args(command).target == "elsewhere:1"
    assert build_parser().parse_args([*command, "--target", "here:2"]).target == "here:2"


def test_a_value_that_does_not_fit_is_one_line_and_exit_code_1(capsys):
    assert main(["generate", "Hi", "--seed", "-1"]) == 1
    assert capsys.readouterr().err.startswith("parley: error: invalid request: generation_config.seed: ")
