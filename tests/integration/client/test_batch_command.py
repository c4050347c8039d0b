"""`parley batch`: files of requests, answered line by line."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import termios
import threading
import time

import grpc
import pytest

from parley.v1 import chat_pb2
from parley_client import (
    batch_files,
    batch_job,
)
from parley_client.cli import main
from tests.support.batch_answers import answered, content, failed

pytestmark = pytest.mark.usefixtures("server_is_default")


@pytest.fixture
def files(tmp_path):
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def line_of(text, **more):
    return json.dumps({"messages": [{"role": "ROLE_USER", "content": text}], **more}) + "\n"


def run(files, *flags):
    return main(["batch", *map(str, files), *flags])


def results_in(path):
    """Each result's text or error, by `id` or line."""
    found = {}
    for result in map(json.loads, path.read_text().splitlines()):
        key = result.get("id", result["line"])
        assert key not in found
        found[key] = result["response"]["choices"][0]["message"]["content"] if "response" in result else result["error"]
    return found


def test_a_file_is_answered_line_by_line(echoes, files, capsys):
    files[0].write_text(line_of("one", generationConfig={"maxNewTokens": 5}) + "\n" + line_of("two", id="b"))
    assert run(files) == 0
    assert results_in(files[1]) == {1: "one", "b": "two"}
    assert echoes.requests[0].requests[0].generation_config.max_new_tokens == 5
    assert capsys.readouterr().err.startswith("2 of 2 answered, 0 failed")


def test_large_files_go_in_chunks_by_number_and_by_size(echoes, files):
    big = "x" * 300_000
    files[0].write_text("".join(line_of(big + str(i)) for i in range(25)) + "".join(line_of("s") for _ in range(200)))
    assert run(files, "--chunk", "90") == 0
    assert len(results_in(files[1])) == 225
    assert all(len(request.requests) <= 90 for request in echoes.requests)
    # The server takes 1 MiB: calls were halved until they fit.
    assert sum(len(request.requests) for request in echoes.requests) == 225


def test_what_the_queue_has_no_room_for_is_asked_again_after_the_delay(server, files):
    asked = []

    def answer(request, context):
        asked.append((time.monotonic(), [content(item) for item in request.requests]))
        for index, item in enumerate(request.requests):
            is_full = len(asked) == 1 and content(item) != "a"
            yield (
                failed(index, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", 0.3)
                if is_full
                else answered(index, content(item))
            )

    server.script["GenerateBatch"] = answer
    files[0].write_text(line_of("a") + line_of("b") + line_of("c"))
    assert run(files) == 0
    assert results_in(files[1]) == {1: "a", 2: "b", 3: "c"}
    assert [texts for _, texts in asked] == [["a", "b", "c"], ["b", "c"]]
    assert asked[1][0] - asked[0][0] >= 0.25


def test_a_failed_item_is_told_and_asked_again_by_the_next_run_and_an_answered_one_is_not(server, files):
    def answer(request, context):
        for index, item in enumerate(request.requests):
            yield (
                failed(index, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
                if content(item) == "bad" and len(server.requests) == 1
                else answered(index, content(item))
            )

    server.script["GenerateBatch"] = answer
    files[0].write_text(line_of("good", id="g") + line_of("bad", id="b"))
    assert run(files) == 1
    error = results_in(files[1])["b"]
    assert (error["code"], error["reason"], error["message"]) == ("INVALID_ARGUMENT", "INVALID_REQUEST", "as scripted")
    assert run(files) == 0
    assert [content(item) for item in server.requests[-1].requests] == ["bad"]
    assert results_in(files[1]) == {"g": "good", "b": "bad"}
    assert run(files) == 0  # nothing is left to ask
    assert len(server.requests) == 2


def test_a_call_that_breaks_is_made_again_for_the_items_that_lack_a_result(server, files):
    def answer(request, context):
        yield answered(0, content(request.requests[0]))
        if len(server.requests) == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        for index, item in enumerate(request.requests[1:], start=1):
            yield answered(index, content(item))

    server.script["GenerateBatch"] = answer
    files[0].write_text("".join(line_of(text) for text in "abc"))
    assert run(files) == 0
    assert results_in(files[1]) == {1: "a", 2: "b", 3: "c"}
    assert [len(request.requests) for request in server.requests] == [3, 2]


def test_an_item_whose_worker_is_lost_each_time_fails_after_so_many_tries(server, files, monkeypatch):
    monkeypatch.setattr(batch_job, "_FIRST_DELAY_S", 0.0)
    lost = failed(0, grpc.StatusCode.UNAVAILABLE, "WORKER_LOST")
    server.script["GenerateBatch"] = lambda request, context: iter([lost])
    files[0].write_text(line_of("a"))
    assert run(files) == 1
    assert results_in(files[1])[1]["reason"] == "WORKER_LOST"
    assert len(server.requests) == 4


@pytest.fixture
def refusals(server, monkeypatch):
    """The server refuses `num_full` calls for want of room, breaks off the next `num_broken`, and answers then."""
    monkeypatch.setattr(batch_job, "_FIRST_DELAY_S", 0.0)

    def script(num_full, num_broken):
        def answer(request, context):
            if len(server.requests) <= num_full:
                server.fails(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
            if len(server.requests) <= num_full + num_broken:
                context.set_trailing_metadata((("grpc-retry-pushback-ms", "-1"),))  # gRPC is not to try again itself
                context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
            yield answered(0)

        server.script["GenerateBatch"] = answer

    return script


@pytest.mark.parametrize("num_full", [1, batch_job._MAX_CALL_TRIES - 1])
def test_a_server_that_had_no_room_and_then_breaks_off_is_asked_again(refusals, files, num_full):
    refusals(num_full=num_full, num_broken=batch_job._MAX_CALL_TRIES - 1)
    files[0].write_text(line_of("a"))
    assert run(files) == 0


def test_a_server_that_had_no_room_and_is_then_gone_is_given_up(server, refusals, files, capsys):
    refusals(num_full=batch_job._MAX_CALL_TRIES + 1, num_broken=50)
    files[0].write_text(line_of("a"))
    assert run(files) == 1
    assert len(server.requests) == 2 * batch_job._MAX_CALL_TRIES + 1
    assert "parley: error: connection failed: gone" in capsys.readouterr().err


def test_a_killed_run_leaves_whole_lines_and_the_next_one_goes_on(server, files):
    def answer(request, context):
        yield answered(1, "b")
        if len(server.requests) == 1:
            server.hold(context)
        yield answered(0, content(request.requests[0]))

    server.script["GenerateBatch"] = answer
    files[0].write_text(line_of("a") + line_of("b") + line_of("c"))
    process = subprocess.Popen([sys.executable, "-m", "parley_client", "batch", *files], stderr=subprocess.PIPE)
    while not (files[1].exists() and files[1].read_text()):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert results_in(files[1]) == {2: "b"}
    with files[1].open("a") as file:
        file.write('{"line": 1, "respo')  # as if it had been killed in the middle of a line

    server.script["GenerateBatch"] = lambda request, context: (
        answered(index, content(item)) for index, item in enumerate(request.requests)
    )
    assert run(files) == 0
    assert results_in(files[1]) == {1: "a", 2: "b", 3: "c"}
    assert [content(item) for item in server.requests[-1].requests] == ["a", "c"]
    assert {path.name for path in files[1].parent.iterdir()} == {"in.jsonl", "out.jsonl"}


def test_a_second_run_into_the_same_file_is_refused_and_harms_nothing(server, files, capsys):
    go_on = threading.Event()

    def answer(request, context):
        yield answered(0, "a")
        assert go_on.wait(20)
        yield answered(1, "b")

    server.script["GenerateBatch"] = answer
    files[0].write_text(line_of("a") + line_of("b"))
    process = subprocess.Popen([sys.executable, "-m", "parley_client", "batch", *files], stderr=subprocess.PIPE)
    while not (files[1].exists() and files[1].read_text()):
        time.sleep(0.01)
    assert run(files) == 1
    assert capsys.readouterr().err == f"parley: error: {files[1]}: another `parley batch` is writing it\n"
    go_on.set()
    process.communicate(timeout=20)
    assert process.returncode == 0
    assert results_in(files[1]) == {1: "a", 2: "b"}
    assert {path.name for path in files[1].parent.iterdir()} == {"in.jsonl", "out.jsonl"}
    assert run(files) == 0  # the lock has gone with the run


def test_a_run_that_meets_the_file_just_before_it_is_replaced_is_refused(files, monkeypatch):
    def replaced(file):
        files[1].with_name("new").write_bytes(b"")
        files[1].with_name("new").replace(files[1])
        return True

    monkeypatch.setattr(batch_files, "_lock", replaced)
    with pytest.raises(batch_files.BadFile, match="another `parley batch` is writing it"):
        batch_files.ResultFile(files[1], set())


def test_a_line_that_a_full_disk_cuts_short_tears_no_other(files):
    items = [batch_files.Item(line, None, chat_pb2.GenerateRequest()) for line in (1, 2)]
    result = {"response": {"text": "x" * 100}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with batch_files.ResultFile(files[1], {1, 2}) as results:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))  # fails writes as a full disk does
        try:
            with pytest.raises(OSError, match="No space left"):
                results.write(items[0], result)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        results.write(items[1], result)  # somebody has made room
    with batch_files.ResultFile(files[1], {1, 2}) as results:
        assert results.answered == {2}


def test_an_output_that_is_a_link_stays_one_and_its_file_keeps_its_mode(echoes, files):
    real = files[1].parent / "elsewhere" / "real.jsonl"
    real.parent.mkdir()
    files[1].symlink_to(real)
    files[0].write_text(line_of("a"))
    assert run(files) == 0
    real.chmod(0o600)
    files[0].write_text(line_of("a") + line_of("b"))
    assert run(files) == 0
    assert files[1].is_symlink()
    assert real.stat().st_mode & 0o777 == 0o600
    assert results_in(real) == {1: "a", 2: "b"}


@pytest.mark.parametrize("output", ["/dev/null", "/dev/stdout"])
def test_an_output_may_be_a_device(echoes, files, output):
    files[0].write_text(line_of("a"))
    command = [sys.executable, "-m", "parley_client", "batch", files[0], output]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert (result.returncode, result.stdout != "") == (0, output == "/dev/stdout")


def test_an_output_may_be_the_file_that_stdout_goes_to(echoes, files):
    files[0].write_text(line_of("a"))
    with files[1].open("wb") as out:
        command = [sys.executable, "-m", "parley_client", "batch", files[0], "/dev/stdout"]
        assert subprocess.run(command, stdout=out, timeout=20, check=False).returncode == 0
    assert results_in(files[1]) == {1: "a"}


def test_ctrl_c_ends_a_batch_quietly(server, files):
    def answer(request, context):
        yield answered(0, "a")
        server.hold(context)

    server.script["GenerateBatch"] = answer
    files[0].write_text(line_of("a") + line_of("b"))
    process = subprocess.Popen([sys.executable, "-m", "parley_client", "batch", *files], stderr=subprocess.PIPE)
    while not (files[1].exists() and files[1].read_text()):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert server.has_seen_the_end()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors.startswith(b"1 of 2 answered")
    assert errors.count(b"\n") == 1


def test_a_call_that_takes_too_long_fails_the_items_that_are_left(server, files):
    def answer(request, context):
        yield answered(1, "b")
        server.hold(context)

    server.script["GenerateBatch"] = answer
    files[0].write_text(line_of("a") + line_of("b"))
    assert run(files, "--timeout", "3") == 1  # enough to connect in, whatever else the machine does
    results = results_in(files[1])
    assert (results[1]["code"], results[2]) == ("DEADLINE_EXCEEDED", "b")


@pytest.mark.parametrize("num_columns", [0, 20])
def test_a_terminal_shows_how_far_it_is_in_one_line(server, files, num_columns):
    def answer(request, context):
        for index, item in enumerate(request.requests):
            time.sleep(0.3)
            yield answered(index, content(item))

    server.script["GenerateBatch"] = answer
    files[0].write_text(line_of("a") + line_of("b"))
    shown, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, num_columns))
    command = [sys.executable, "-m", "parley_client", "batch", *files]
    assert subprocess.run(command, stderr=terminal, timeout=20, check=False).returncode == 0
    os.close(terminal)
    text = os.read(shown, 10_000).decode()
    os.close(shown)
    begun, going_on, *_ = (line.removesuffix("\x1b[K") for line in text.split("\r")[1:])
    assert begun == "0 of 2 answered, 0 failed, 0 tokens/s"[: num_columns - 1 if num_columns else None]
    assert going_on.startswith("1 of 2 answered, 0 ")
    assert len(going_on) < (num_columns or 80)
    assert text.splitlines()[-1].startswith("2 of 2 answered, 0 failed, ")
    assert text.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "Expecting property name"),
        ("[1]", "is no JSON object"),
        ('{"messages": [{"role": "ROLE_KING"}]}', "ROLE_KING"),
        ('{"mesages": []}', "mesages"),
        ('{"generation_config": {"max_new_tokens": -1}}', "max_new_tokens"),
        ('{"id": 7}', "id: must be a string"),
        (r'{"id": "\ud800"}', "id: holds a lone surrogate"),
        ('{"id": "first"}', "the id 'first' is that of line 1 already"),
        ("\xff", "codec can't decode"),
    ],
)
def test_a_bad_line_is_told_with_its_number_before_anything_is_asked(server, files, capsys, line, said):
    files[0].write_bytes(line_of("a", id="first").encode() + b"\n" + line.encode("latin-1") + b"\n")
    assert run(files) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"parley: error: {files[0]}:3: ")
    assert said in error
    assert not server.requests
    assert not files[1].exists()


def test_of_many_bad_lines_the_first_are_told(files, capsys):
    files[0].write_text("{\n" * 1000)
    assert run(files) == 1
    assert len(capsys.readouterr().err.splitlines()) == 20


def test_files_that_are_not_there_or_not_ours_are_told(server, files, capsys):
    assert run(files) == 1
    assert capsys.readouterr().err == f"parley: error: {files[0]}: No such file or directory\n"
    files[0].write_text(line_of("a"))
    for text, said in (
        ("precious\n", "is no result of `parley batch`"),
        ('{"line": 9, "response": {}}\n', "answers 9"),
    ):
        files[1].write_text(text)
        assert run(files) == 1
        assert f"{files[1]}:1: {said}" in capsys.readouterr().err
        assert files[1].read_text() == text
    for line in (line_of("a"), line_of("a", id="x")):
        files[0].write_text(line)
        assert run((files[0], files[0])) == 1  # the input itself
        assert files[0].read_text() == line
    capsys.readouterr()
    output = files[0].parent / "nowhere" / "out.jsonl"
    assert run((files[0], output)) == 1
    assert capsys.readouterr().err == f"parley: error: {output}: No such file or directory\n"


def test_a_pipe_is_refused_as_input_since_it_can_be_read_but_once(server, files, capsys):
    os.mkfifo(files[0])
    assert run(files) == 1
    assert f"parley: error: {files[0]}: is a pipe or device" in capsys.readouterr().err
    assert not files[1].exists()


def test_a_server_that_is_not_there_is_told_at_once(files, capsys):
    files[0].write_text(line_of("a"))
    assert run(files, "--target", "localhost:1") == 1
    assert "parley: error: connection failed" in capsys.readouterr().err
