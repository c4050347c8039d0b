"""Flags and environment of `parleyd serve`."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from parleyd.cli import build_parser, flag_of, main, variable_of
from parleyd.config import ModelSettings, ServerSettings, Settings
from parleyd.errors import StartupError
from parleyd.gateway.observer import Observer
from parleyd.gateway.options import server_options

OPTIONS = [*fields(ServerSettings), *fields(ModelSettings)]
NUMBERS = [str(option.name) for option in OPTIONS if str(option.type).startswith(("int", "float"))]


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_every_setting_is_a_flag_and_a_variable_and_is_explained(option: object) -> None:
    name = option.name  # type: ignore[attr-defined]
    kind = option.type.removesuffix(" | None")  # type: ignore[attr-defined]
    value = {"bool": "true", "int": "7", "float": "7", "str": "x"}[kind]
    if choices := option.metadata["choices"]:  # type: ignore[attr-defined]
        value = choices[-1]
    if name in ("max_message_bytes", "max_batch_tokens", "max_context_tokens"):
        value = "4096"
    flag = [flag_of(name)] if value == "true" else [flag_of(name), value]
    by_flag = vars(build_parser({}).parse_args(["serve", *flag]))
    by_variable = vars(build_parser({variable_of(name): value}).parse_args(["serve"]))
    assert by_flag == by_variable
    assert str(by_flag[name]).lower().removesuffix(".0") == value
    assert option.metadata["help"].endswith(".")  # type: ignore[attr-defined]
    if kind == "str":  # the help calls numbers N
        assert option.metadata["choices"] or option.metadata["metavar"]  # type: ignore[attr-defined]


def test_a_flag_wins_over_its_variable() -> None:
    arguments = build_parser({"PARLEY_MAX_QUEUE": "3"}).parse_args(["serve", "--max-queue", "4"])
    assert arguments.max_queue == 4


@pytest.mark.parametrize("arguments", [["--version"], ["--help"]], ids=" ".join)
def test_an_output_that_cannot_be_written_is_one_line(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "parleyd", *arguments]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert result.stderr == "parleyd: error: the output cannot be written: No space left on device\n"


def test_a_flag_is_not_guessed_from_its_beginning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["serve", "--max-queue-token", "7"])
    assert raised.value.code == 2
    assert "unrecognized arguments: --max-queue-token 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value"), [("--port", "70000"), ("--port", "x"), ("--drain-delay", "nan"), ("--drain-timeout", "inf")]
)
def test_a_bad_value_is_refused_with_the_allowed_range(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        build_parser({}).parse_args(["serve", flag, value])
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert flag in error and "of" in error


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_nothing_can_count_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        build_parser({}).parse_args(["serve", flag_of(name), str(10**30)])
    assert raised.value.code == 2
    assert f"{flag_of(name)}: {10**30} is no " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["keepalive_time", "keepalive_timeout", "max_message_bytes"])
def test_the_largest_number_that_is_allowed_is_one_that_grpc_takes(name: str) -> None:
    (largest,) = (option.metadata["maximum"] for option in fields(ServerSettings) if option.name == name)
    arguments = build_parser({}).parse_args(["serve", flag_of(name), str(largest)])
    options = server_options(ServerSettings(**{name: getattr(arguments, name)}))
    assert all(value < 2**31 for _, value in options)


def test_an_address_in_brackets_as_targets_have_it_is_that_address() -> None:
    flags = ["--host", "[::1]", "--admin-host", "[::]"]
    arguments = build_parser({}).parse_args(["serve", *flags])
    assert (arguments.host, arguments.admin_host) == ("::1", "::")


def test_the_served_name_is_the_one_given_else_the_hub_id_else_the_base_name(tmp_path: Path) -> None:
    def name(model: str, given: str | None = None) -> str:
        return Settings(
            server=ServerSettings(served_model_name=given), model=ModelSettings(model=model)
        ).served_model_name

    (tmp_path / "my-model").mkdir()
    (tmp_path / "file.gguf").touch()
    assert name("Qwen/Qwen2.5-7B-Instruct") == "Qwen/Qwen2.5-7B-Instruct"
    assert name(f"{tmp_path}/my-model/") == "my-model"
    assert name(f"{tmp_path}/file.gguf") == "file.gguf"
    assert name(f"{tmp_path}/file.gguf", "given") == "given"
    assert name("smollm2-135m-instruct") == "smollm2-135m-instruct"


@pytest.mark.parametrize("service", ["PARLEY", "PARLEY_METRICS", "PARLEY_CANARY", "PARLEY_ADMIN"])
def test_what_kubernetes_says_of_a_service_whose_name_begins_with_parley_is_no_setting(service: str) -> None:
    link = "tcp://10.0.0.1:50051"
    links = {
        f"{service}_SERVICE_HOST": "10.0.0.1",
        f"{service}_SERVICE_PORT": "50051",
        f"{service}_SERVICE_PORT_GRPC": "50051",
        f"{service}_PORT": link,
        f"{service}_PORT_50051_TCP": link,
        f"{service}_PORT_50051_TCP_PROTO": "tcp",
        f"{service}_PORT_50051_TCP_PORT": "50051",
        f"{service}_PORT_50051_TCP_ADDR": "10.0.0.1",
        f"{service}_PORT_53_UDP": "udp://10.0.0.1:53",
    }
    arguments = build_parser(links).parse_args(["serve"])
    assert (arguments.port, arguments.admin_port) == (50051, None)


@pytest.mark.parametrize("variable", ["PARLEY_MAX_QUEU", "PARLEY_MAX_QUEUE", "PARLEY_PORT", "PARLEY_CANARY_PORT"])
def test_a_variable_that_makes_no_sense_stops_serve_and_nothing_else(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "many")
    with pytest.raises(SystemExit) as raised:
        main(["serve"])
    assert raised.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"parleyd serve: error: environment variable {variable}: ")
    assert main(["keys", "new", "--name", "me"]) == 0
    for asked in (["--version"], ["--help"], ["serve", "--help"]):
        with pytest.raises(SystemExit) as raised:
            main(asked)
        assert raised.value.code == 0


def test_only_the_address_of_a_port_is_taken_for_one_of_a_service() -> None:
    endpoint = "tcp://collector:4317"
    assert build_parser({"PARLEY_OTLP_ENDPOINT": endpoint}).parse_args(["serve"]).otlp_endpoint == endpoint


def test_a_key_that_could_not_be_written_down_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["keys", "new", "--name", "me"]) == 1
    (error,) = capfd.readouterr().err.splitlines()
    assert error == "parleyd: error: the key's entry cannot be written: No space left on device"


def test_without_a_home_folder_one_line_asks_for_a_cache_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")  # a user id that the system does not know

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert main(["serve", "--port", "0"]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("parleyd: error: HOME is not set: ") and "--cache" in error


def test_a_start_in_a_folder_that_has_been_removed_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["serve", "--port", "0"]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("parleyd: error: the folder that it is started in has been removed")


@pytest.mark.parametrize("flag", ["--model", "--host", "--served-model-name", "--cache"])
def test_a_value_that_is_no_utf_8_is_refused_in_one_line(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "0", flag, os.fsdecode(b"caf\xe9")]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error == f"parleyd: error: {flag} 'caf\\udce9' is no UTF-8"


def test_a_collector_that_is_no_url_stops_the_start() -> None:
    with pytest.raises(StartupError, match=r"--otlp-endpoint http://\[::1: Invalid IPv6 URL"):
        Observer(lambda: None, "http://[::1")  # type: ignore[arg-type, return-value]


def test_a_collector_without_a_scheme_stops_the_start() -> None:
    with pytest.raises(StartupError, match=r"--otlp-endpoint collector:4317: must begin with http:// or https://"):
        Observer(lambda: None, "collector:4317")  # type: ignore[arg-type, return-value]


def test_without_the_tracing_packages_one_line_tells_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "parleyd.telemetry.tracing", None)
    with pytest.raises(StartupError, match=r"run `pip install '\.\[tracing\]'` in Parley's folder"):
        Observer(lambda: None, "http://collector:4317")  # type: ignore[arg-type, return-value]
