"""The arguments of the `parley` command."""

from __future__ import annotations

import re

import pytest

from parley_client import AsyncClient, Client, cli
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


@pytest.mark.parametrize(
    "target",
    [
        "localhost:50051",
        "parley.example:https",
        "[::1]:50051",
        "dns:///parley.example:50051",
        "dns:parley.example",
        "unix:/run/parley.sock",
        "unix:///run/parley.sock",
        "unix:parley:65536",
        "unix-abstract:parley",
        "vsock:2:65536",
        "ipv4:10.0.0.1:50051,10.0.0.2:50051",
        "ipv6:[::1]:50051",
        "xds:///parley",
    ],
)
def test_every_kind_of_target_that_grpc_knows_is_taken(target):
    assert build_parser().parse_args(["model", "--target", target]).target == target
    Client(target).close()


@pytest.mark.parametrize(
    "target",
    [
        "",
        "localhost",
        "http://localhost:50051",
        "::1:50051",
        "localhost:",
        "localhost:65536",
        "a b:1",
        "a:1/",
        "caf\udce9:1",
        "dns:\0",
        "dns:///",
        "dns:///a:1/",
        "dns:///a:65536",
        "ipv4:10.0.0.1",
        "ipv4:10.0.0.1:65536,10.0.0.2:1",
        "ipv6:[::1]",
        "unix://run/parley.sock",
    ],
)
def test_what_grpc_would_take_for_something_else_is_no_target(target, monkeypatch, capsys):
    for client in Client, AsyncClient:
        with pytest.raises(ValueError, match=re.escape(f"{target!r} is no HOST:PORT, such as localhost:50051")):
            client(target)
    monkeypatch.setenv("PARLEY_API_KEY", "k")
    with pytest.raises(SystemExit) as caught:
        main(["model", "--target", target])
    assert caught.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"{target!r} is no HOST:PORT, such as localhost:50051" in error


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ([("x-team", "blue")], "metadata must be a dict, not list"),
        ("x-team", "metadata must be a dict, not str"),
        ({"x team": "blue"}, "metadata: 'x team' is no key: letters, digits, '_', '-' and '.' make one"),
        ({5: "blue"}, "metadata: 5 is no key: letters, digits, '_', '-' and '.' make one"),
        ({"x-team": "Jürgen"}, "metadata['x-team'] is no text in printable ASCII"),
        ({"x-team": "blue\n"}, "metadata['x-team'] is no text in printable ASCII"),
        ({"x-team": 5}, "metadata['x-team'] is no text in printable ASCII"),
        ({"x-team": b"blue\xff"}, "metadata['x-team'] is no text in printable ASCII"),
        ({"x-team-bin": "blue"}, "metadata['x-team-bin'] must be bytes, as the key ends in -bin"),
    ],
)
async def test_what_grpc_takes_for_no_metadata_is_told_at_once(metadata, error):
    for client in Client, AsyncClient:
        with pytest.raises((TypeError, ValueError), match=f"^{re.escape(error)}$"):
            client(metadata=metadata)


async def test_a_key_that_is_no_text_is_told_at_once():
    for client in Client, AsyncClient:
        with pytest.raises(TypeError, match=r"^the API key must be text, not bytes$"):
            client(api_key=b"k")


def test_a_key_file_that_is_no_text_holds_no_key(tmp_path):
    (tmp_path / "key").write_bytes(b"k\xff")
    with pytest.raises(SystemExit, match=r"^parley: error: the API key is empty, or has .* letters beyond ASCII"):
        main(["model", "--api-key-file", str(tmp_path / "key")])


def test_a_key_that_would_cross_a_network_in_plain_text_is_told_with_the_flags_that_help(monkeypatch):
    monkeypatch.setenv("PARLEY_API_KEY", "k")
    with pytest.raises(SystemExit) as caught:
        main(["model", "--target", "my-host:50051"])
    assert str(caught.value) == (
        "parley: error: an API key must not cross the network to my-host:50051 in plain text: "
        "connect with --tls or --tls-ca, or say --insecure"
    )


def test_ctrl_c_while_the_arguments_are_read_is_quiet(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "build_parser", interrupted)
    assert main(["model"]) == 130
