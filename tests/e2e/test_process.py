"""`parleyd serve` as a process: start, signals, exit codes, a killed worker, ports."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2

from parleyd.worker.openmp import openmp_variables
from tests.support.eventually import eventually
from tests.support.requests import ask, reason_of
from tests.support.served import ServedProcess, serve_until_exit
from tests.support.tiny_models import make_model
from tests.support.tiny_tokenizer import write_tiny_tokenizer

CPUS = sorted(os.sched_getaffinity(0))
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def test_stdout_tells_where_to_connect_and_nothing_else() -> None:
    with ServedProcess("--admin-port", "0") as served:
        assert served.process.stdout is not None
        assert re.fullmatch(r"listening on 127\.0\.0\.1:\d+\n", served.first_line)
        assert re.fullmatch(r"admin on 127\.0\.0\.1:\d+\n", served.process.stdout.readline())
        assert served.terminate() == 0
        assert served.process.stdout.read() == ""


def test_sigterm_lets_streams_finish_and_exits_0() -> None:
    with ServedProcess("--drain-delay", "0") as served:
        assert served.first_line.startswith("listening on 127.0.0.1:")
        served.wait_health()
        stream = served.stub.GenerateStream(
            ask("Tell me a long story.", max_new_tokens=80, ignore_eos=True), timeout=60
        )
        received = list(next(stream).token_ids)
        served.process.send_signal(signal.SIGTERM)
        served.wait_health(NOT_SERVING)
        with pytest.raises(grpc.RpcError) as raised:
            served.stub.Generate(ask("too late"), timeout=10)
        assert (raised.value.code(), reason_of(raised.value)) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        received += [i for response in stream for i in response.token_ids]
        assert len(received) == 80
        (worker,) = served.worker_pids() or [0]
        assert served.process.wait(20) == 0
        assert served.process.stdout is not None and served.process.stdout.read() == ""
        assert not worker or not Path(f"/proc/{worker}").exists()


def test_a_killed_worker_is_replaced_and_the_gateways_death_ends_its_worker() -> None:
    with ServedProcess("--max-running", "1") as served:
        served.wait_health()
        (worker,) = served.worker_pids()
        stream = served.stub.GenerateStream(
            ask("Tell me a long story.", max_new_tokens=60, ignore_eos=True), timeout=60
        )
        num_tokens = len(next(stream).token_ids)
        queued = served.stub.Generate.future(ask("Say hello.", max_new_tokens=4), timeout=60)
        os.kill(worker, signal.SIGKILL)
        assert num_tokens + sum(len(response.token_ids) for response in stream) == 60
        assert queued.result().choices[0].token_ids
        (replacement,) = served.worker_pids()
        assert replacement != worker
        os.kill(served.process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while Path(f"/proc/{replacement}").exists():
            assert time.monotonic() < deadline, "the worker outlived its gateway"
            time.sleep(0.01)


@pytest.mark.skipif("OMP_PROC_BIND" not in openmp_variables({}), reason="this machine has two threads a core")
@pytest.mark.parametrize("arguments", [(), ("--engine", "generate")], ids=["batching", "generate"])
def test_the_threads_that_compute_have_a_processor_each(arguments: tuple[str, ...]) -> None:
    with ServedProcess(*arguments) as served:
        served.wait_health()
        served.stub.Generate(ask("Say hello.", max_new_tokens=4), timeout=60)
        bound = [cpus for cpus in _affinities(served) if len(cpus) == 1]
        assert sorted(set(map(tuple, bound))) == [(cpu,) for cpu in CPUS]


def test_threads_are_left_to_the_kernel_where_that_is_wanted() -> None:
    with ServedProcess("--no-bind-threads") as served:
        served.wait_health()
        assert all(cpus == CPUS for cpus in _affinities(served))


def _affinities(served: ServedProcess) -> list[list[int]]:
    """The processors of each thread of the worker."""
    (worker,) = served.worker_pids()
    return [sorted(os.sched_getaffinity(int(thread))) for thread in os.listdir(f"/proc/{worker}/task")]


def test_sigterm_right_after_the_port_is_bound_exits_0() -> None:
    with ServedProcess("--drain-delay", "0") as served:
        assert served.terminate() == 0


def test_a_ctrl_c_while_the_worker_starts_is_the_gateways_alone() -> None:
    command = [sys.executable, "-m", "parleyd", "serve", "--port", "0", "--drain-delay", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        # A worker has a group of its own a moment after it has begun.
        eventually(lambda: any(os.getpgid(int(pid)) == int(pid) for pid in children.read_text().split()))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in log and "ERROR" not in log


@pytest.mark.parametrize(("signal_name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize("module", ["asyncio", "grpc"])
def test_a_signal_amid_the_imports_ends_quietly_and_by_a_handler(
    tmp_path: Path, module: str, signal_name: str, code: int
) -> None:
    (tmp_path / f"{module}.py").write_text(f"import signal; signal.raise_signal(signal.{signal_name})")
    command = [Path(sys.executable).parent / "parleyd", "serve", "--port", "0"]
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (code, "", "")


def test_nothing_is_imported_from_the_folder_that_the_service_is_started_in(tmp_path: Path) -> None:
    for name in ("torch", "transformers", "msgspec"):
        (tmp_path / f"{name}.py").write_text('raise SystemExit("hijacked")')
    command = [str(Path(sys.executable).parent / "parleyd"), "serve", "--port", "0", "--model", "/no/such/folder"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert "hijacked" not in result.stderr
    assert "/no/such/folder" in result.stderr.splitlines()[-1]


def test_a_port_in_use_is_one_clear_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = serve_until_exit(["serve", "--port", str(taken.getsockname()[1])])
    assert (result.returncode, result.stdout) == (1, "")
    (error,) = result.stderr.splitlines()
    assert error.startswith("parleyd: error: cannot listen on 127.0.0.1:")


def test_an_admin_port_in_use_is_one_line_and_nothing_is_announced() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = serve_until_exit(["serve", "--port", "0", "--admin-port", str(port)])
    assert (result.returncode, result.stdout) == (1, "")
    (error,) = result.stderr.splitlines()
    assert error.startswith(f"parleyd: error: --admin-port {port}: cannot listen on 127.0.0.1:{port}: ")


@pytest.mark.parametrize("stdout", ["/dev/full", "a pipe that nobody reads"])
def test_a_stdout_that_cannot_be_written_ends_nothing(stdout: str) -> None:
    reader, writer = (None, os.open(stdout, os.O_WRONLY)) if stdout.startswith("/") else os.pipe()
    if reader is not None:
        os.close(reader)
    process = subprocess.Popen(
        [sys.executable, "-m", "parleyd", "serve", "--port", "0", "--drain-delay", "0"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert process.stderr is not None
    warning = process.stderr.readline()
    assert "stdout cannot be written" in warning and "listening on 127.0.0.1:" in warning
    process.terminate()
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in log


def test_a_prompt_is_tokenized_without_a_thread_for_each_processor() -> None:
    with ServedProcess("--drain-delay", "0", environ={"RAYON_NUM_THREADS": "200"}) as served:
        served.wait_health()
        assert served.stub.Generate(ask("Say hello.", max_new_tokens=4), timeout=60).choices[0].token_ids
        assert psutil.Process(served.process.pid).num_threads() < 200


def test_a_stderr_that_nobody_reads_stops_nothing() -> None:
    with _full_pipe() as (stderr, writer, filling), ServedProcess("--drain-delay", "0", stderr=writer) as served:
        os.close(writer)
        served.wait_health()
        assert served.stub.Generate(ask("Say hello.", max_new_tokens=4), timeout=60).choices[0].token_ids
        assert stderr.read(filling) == b"." * filling
        assert served.terminate() == 0
        log = stderr.read().decode()
    assert re.search("model ready .* ended with exit code 0", log, re.DOTALL)
    assert " serving " in log  # before or behind what the other process has to say


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_start_that_fails_ends_though_nobody_reads_why(log_format: str) -> None:
    arguments = ("--model", "/no/such/folder", "--log-format", log_format)
    with _full_pipe() as (_, writer, _), ServedProcess(*arguments, stderr=writer) as served:
        os.close(writer)
        assert served.process.wait(60) == 1


@contextmanager
def _full_pipe() -> Iterator[tuple[BinaryIO, int, int]]:
    """Its two ends, and how many octets are in it."""
    reader, writer = os.pipe()
    filling = os.write(writer, b"." * fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ))
    with open(reader, "rb") as stderr:
        yield stderr, writer, filling


def test_a_conversion_logs_nothing_but_json_and_leaves_no_process(tmp_path: Path) -> None:
    with ServedProcess("--cache", str(tmp_path), "--log-format", "json", "--drain-delay", "0") as served:
        served.wait_health()
        (worker,) = served.worker_pids()
        assert psutil.Process(worker).children() == []
        assert served.terminate() == 0
        messages = [json.loads(line)["message"] for line in served.log.splitlines()]
    assert any(message.startswith("converted in ") for message in messages)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "/no/such/folder"], "/no/such/folder"),
        (["--model", "{empty}"], "{empty}"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_one_clear_line(tmp_path: Path, arguments: list[str], text: str) -> None:
    arguments = [argument.format(empty=tmp_path) for argument in arguments]
    result = serve_until_exit(["serve", "--port", "0", *arguments])
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("parleyd: error: ")]
    assert len(errors) == 1 and text.format(empty=tmp_path) in errors[0]


def test_a_log_in_json_has_no_other_line_where_the_start_fails() -> None:
    result = serve_until_exit(["serve", "--port", "0", "--model", "/no/such/folder", "--log-format", "json"])
    assert result.returncode == 1
    last = [json.loads(line) for line in result.stderr.splitlines()][-1]
    assert last["levelname"] == "ERROR" and last["message"].startswith("--model /no/such/folder")


@pytest.mark.parametrize("values", [{"num_hidden_layers": -1}, {"sliding_window": "x"}])
def test_a_configuration_that_no_model_can_have_is_one_clear_line(tmp_path: Path, values: dict[str, object]) -> None:
    make_model("Llama").save_pretrained(write_tiny_tokenizer(tmp_path / "model"))
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))
    arguments = ["--port", "0", "--model", str(config.parent), "--cache", str(tmp_path / "cache")]
    result = serve_until_exit(["serve", *arguments])
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    (error,) = [line for line in result.stderr.splitlines() if "error: " in line]
    assert error.startswith(f"parleyd: error: --model {config.parent}: it cannot be served: ")


@pytest.mark.parametrize(
    ("arguments", "environ", "text"),
    [
        (["--max-queue", "-1"], {}, "--max-queue"),
        (["--engine", "magic"], {}, "generate"),
        ([], {"PARLEY_MAX_QUEUE": "many"}, "PARLEY_MAX_QUEUE"),
        ([], {"PARLEY_MAX_QUEU": "3"}, "PARLEY_MAX_QUEU"),
        (["--no-such-flag"], {}, "--no-such-flag"),
    ],
)
def test_a_bad_setting_stops_the_start_with_its_name(arguments: list[str], environ: dict[str, str], text: str) -> None:
    result = serve_until_exit(["serve", *arguments], env={**os.environ, **environ})
    assert result.returncode == 2
    (error,) = result.stderr.splitlines()
    assert text in error and error.endswith("(see parleyd serve --help)")


def test_help_names_every_flag() -> None:
    result = serve_until_exit(["serve", "--help"])
    assert result.returncode == 0
    for flag in ("--model", "--dtype", "--device-map", "--attn-implementation", "--trust-remote-code", "--max-queue"):
        assert flag in result.stdout
