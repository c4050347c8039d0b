"""Workers that die, hang or fail to load: what clients see of it."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from parley.v1 import chat_pb2
from parleyd.gateway import server, spare_worker, supervisor, worker_client
from parleyd.gateway.supervisor import State
from tests.integration.conftest import FOREVER, StartGateway, assert_answers
from tests.support.eventually import eventually
from tests.support.gateway import GatewayThread
from tests.support.requests import ask, reason_of
from tests.support.tiny_tokenizer import write_tiny_tokenizer

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
# To the worker a megabyte, which no socket holds.
LARGE = chat_pb2.GenerateRequest(
    messages=ask("!wait").messages,
    response_format={"choice": {"choices": [f"{i}{'y' * 1000}" for i in range(1000)]}},
)


def worker_pid(gateway: GatewayThread) -> int:
    pid = gateway.gateway.supervisor.worker_pid
    assert pid is not None
    return pid


def test_killing_the_worker_pauses_open_streams_and_queued_requests(single: GatewayThread) -> None:
    running = single.stub.GenerateStream(ask("!forever", max_new_tokens=1000))
    ids = list(next(running).token_ids)
    queued = single.stub.Generate.future(ask("patient"), timeout=20)
    eventually(lambda: single.gateway.admission.num_waiting == 1)
    pid = worker_pid(single)
    os.kill(pid, signal.SIGKILL)
    ids += [i for response in running for i in response.token_ids]
    assert ids == (list(b"all work and no play ") * 50)[:1000]
    assert queued.result(20).choices[0].message.content == "patient"
    assert worker_pid(single) != pid
    assert single.gateway.worker.num_handed_over == 1
    assert single.health.Check(health_pb2.HealthCheckRequest(), timeout=5).status == SERVING


def test_streams_survive_many_deaths_of_the_worker_without_a_token_lost_or_doubled(start_gateway: StartGateway) -> None:
    gateway = start_gateway(worker=("--step-delay", "0.005"), max_running=4)
    texts = [f"answer {i} " * 20 for i in range(4)]
    pending = [gateway.stub.Generate.future(ask(f"!die-at {i * 40 + 10} {texts[i]}"), timeout=60) for i in range(4)]
    assert [f.result().choices[0].message.content for f in pending] == texts
    assert gateway.gateway.supervisor.num_restarts == 4
    gateway.wait_idle()


def test_a_worker_that_hangs_is_replaced(start_gateway: StartGateway) -> None:
    gateway = start_gateway(worker_timeout=1.0)
    response = gateway.stub.Generate(ask("!hang-at 3 abcdef"), timeout=30)
    assert response.choices[0].message.content == "abcdef"
    assert gateway.gateway.supervisor.num_restarts in (1, 2)  # one that a busy machine starves looks no different


def test_a_worker_that_is_stopped_for_a_moment_is_not_replaced(start_gateway: StartGateway) -> None:
    gateway = start_gateway(worker=("--step-delay", "0.001"), worker_timeout=5.0)
    running = gateway.stub.GenerateStream(ask("!forever", max_new_tokens=100))
    num_ids = len(next(running).token_ids)
    os.kill(worker_pid(gateway), signal.SIGSTOP)
    time.sleep(0.3)
    os.kill(worker_pid(gateway), signal.SIGCONT)
    assert num_ids + sum(len(response.token_ids) for response in running) == 100
    assert gateway.gateway.supervisor.num_restarts == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_all_processes_is_the_gateways_alone(start_gateway: StartGateway, number: signal.Signals) -> None:
    gateway = start_gateway()
    os.kill(worker_pid(gateway), number)
    assert_answers(gateway)
    assert gateway.gateway.supervisor.num_restarts == 0


def test_a_request_that_kills_the_worker_twice_fails_alone(start_gateway: StartGateway) -> None:
    gateway = start_gateway(worker=("--step-delay", "0.005"), max_running=2, max_worker_restarts=2)
    running = gateway.stub.GenerateStream(ask("!forever", max_new_tokens=400))
    ids = list(next(running).token_ids)
    for _ in range(2):  # as often as one likes: the service is not given up for it
        with pytest.raises(grpc.RpcError) as raised:
            gateway.stub.Generate(ask("!die"), timeout=20)
        assert (raised.value.code(), reason_of(raised.value)) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    ids += [i for response in running for i in response.token_ids]
    assert ids == (list(b"all work and no play ") * 20)[:400]
    # One more where the stream, just moved, may be to blame.
    assert gateway.gateway.supervisor.num_restarts in (4, 5, 6)
    gateway.wait_idle()


def test_a_request_that_kills_workers_in_its_first_decode_fails_alone(start_gateway: StartGateway) -> None:
    gateway = start_gateway(worker=("--step-delay", "0.005"), max_running=2)
    running = gateway.stub.GenerateStream(ask("!forever", max_new_tokens=400))
    ids = list(next(running).token_ids)
    with pytest.raises(grpc.RpcError) as raised:
        gateway.stub.Generate(ask("!die-after 1 " + "x" * 100), timeout=30)
    assert (raised.value.code(), reason_of(raised.value)) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    ids += [i for response in running for i in response.token_ids]
    assert ids == (list(b"all work and no play ") * 20)[:400]
    assert gateway.gateway.supervisor.num_restarts <= 3


def test_of_several_that_kill_the_worker_at_once_each_fails_and_the_service_goes_on(
    start_gateway: StartGateway,
) -> None:
    gateway = start_gateway(max_running=4, max_worker_restarts=3)
    calls = [gateway.stub.Generate.future(ask("!die"), timeout=60) for _ in range(4)]
    assert [reason_of(call.exception()) for call in calls] == ["INTERNAL"] * 4
    assert_answers(gateway)


def test_a_worker_that_sends_nonsense_is_replaced(start_gateway: StartGateway) -> None:
    gateway = start_gateway()
    assert gateway.stub.Generate(ask("!garble"), timeout=20).choices[0].message.content == "xy"
    assert gateway.gateway.supervisor.num_restarts == 1


def test_a_worker_that_hangs_as_it_loads_is_replaced(start_gateway: StartGateway, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    gateway = start_gateway(worker=("--hang-if", str(marker), "--step-delay", "0.02"), worker_timeout=1.0)
    marker.touch()
    assert gateway.stub.Generate(ask("!die-at 3 abcdef"), timeout=60).choices[0].message.content == "abcdef"
    assert not marker.exists()
    assert gateway.gateway.supervisor.num_restarts in (2, 3)  # one that a busy machine starves looks no different


def test_a_model_whose_files_are_being_replaced_as_its_worker_dies_is_read_again(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    folder = write_tiny_tokenizer(tmp_path / "model")
    gateway = start_gateway(folder=folder)
    supervisor = gateway.gateway.supervisor
    whole = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(whole[:100])
    supervisor._info = None  # as if the next worker told of another model
    call = gateway.stub.Generate.future(ask("!die-at 3 abcdef"), timeout=60)
    eventually(lambda: supervisor.num_restarts >= 2 or not gateway.thread.is_alive(), timeout_s=30)
    (folder / "tokenizer.json").write_bytes(whole)
    assert call.result().choices[0].message.content == "abcdef"


def test_a_worker_that_hung_while_it_was_idle_is_replaced(start_gateway: StartGateway) -> None:
    gateway = start_gateway(worker_timeout=2.0)
    os.kill(worker_pid(gateway), signal.SIGSTOP)
    time.sleep(3.0)
    assert gateway.gateway.supervisor.num_restarts == 0  # nobody waits for it
    assert_answers(gateway)
    assert gateway.gateway.supervisor.num_restarts == 1


def test_a_worker_that_hangs_is_replaced_though_clients_have_little_patience(start_gateway: StartGateway) -> None:
    gateway = start_gateway(worker_timeout=1.0)
    os.kill(worker_pid(gateway), signal.SIGSTOP)
    deadline = time.monotonic() + 10
    while not gateway.gateway.supervisor.num_restarts:
        assert time.monotonic() < deadline, "nobody noticed"
        with suppress(grpc.RpcError):
            gateway.stub.Generate(ask("ok"), timeout=0.2)
        time.sleep(0.3)  # longer than the watchdog takes from one look to the next
    assert_answers(gateway)


def test_a_worker_that_hangs_before_it_has_taken_all_is_replaced_though_clients_have_little_patience(
    start_gateway: StartGateway,
) -> None:
    gateway = start_gateway(worker_timeout=1.0)
    supervisor = gateway.gateway.supervisor
    worker = supervisor._worker
    assert worker is not None
    os.kill(worker_pid(gateway), signal.SIGSTOP)
    call = gateway.stub.GenerateStream(LARGE)
    eventually(lambda: worker.is_behind)
    call.cancel()
    worker.num_signs += 1  # as if it had stopped just now
    deadline = time.monotonic() + 10
    while not supervisor.num_restarts:
        assert time.monotonic() < deadline, "nobody noticed"
        with suppress(grpc.RpcError):
            gateway.stub.Generate(ask("ok"), timeout=0.1)
        time.sleep(0.3)  # longer than the watchdog takes from one look to the next
    assert_answers(gateway)


def test_a_worker_is_not_replaced_for_requests_that_were_given_up_at_once(start_gateway: StartGateway) -> None:
    # The engine sleeps as the second comes and goes; it has told of the first by then.
    gateway = start_gateway(worker=("--step-delay", "0.6"), worker_timeout=2.0)
    worker = gateway.gateway.supervisor._worker
    for num_submitted in (1, 2):
        call = gateway.stub.Generate.future(ask("!wait"), timeout=60)
        eventually(lambda expected=num_submitted: worker.num_submitted == expected)
        call.cancel()
        eventually(lambda: gateway.gateway.worker.num_open == 0)
        time.sleep(0.2)
    time.sleep(3.0)
    assert gateway.gateway.supervisor.num_restarts == 0


def test_requests_that_are_given_up_do_not_pile_up_before_a_worker_that_stands_still(
    start_gateway: StartGateway,
) -> None:
    gateway = start_gateway()
    os.kill(worker_pid(gateway), signal.SIGSTOP)
    for _ in range(10):
        call = gateway.stub.GenerateStream(LARGE)
        eventually(lambda: gateway.gateway.worker.num_open == 1)
        call.cancel()
        gateway.wait_idle()
    assert gateway.gateway.supervisor._worker.link._writer.transport.get_write_buffer_size() < 3 * LARGE.ByteSize()
    os.kill(worker_pid(gateway), signal.SIGCONT)
    assert_answers(gateway)


def test_one_that_makes_no_token_does_not_keep_others_waiting_after_a_death(
    start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_client, "_TRIAL_S", 0.5)
    gateway = start_gateway(max_running=4)
    silent = gateway.stub.GenerateStream(ask("!wait"))
    supervisor = gateway.gateway.supervisor
    eventually(lambda: gateway.gateway.worker.num_open == 1)
    os.kill(worker_pid(gateway), signal.SIGKILL)
    eventually(lambda: supervisor.num_restarts == 1 and supervisor.state is State.READY)
    for _ in range(2):
        assert_answers(gateway)
    silent.cancel()


def test_those_that_came_with_a_poisoned_request_are_served(start_gateway: StartGateway) -> None:
    gateway = start_gateway(worker=("--step-delay", "0.02"), max_running=4)
    calls = [gateway.stub.Generate.future(ask(text), timeout=30) for text in ("a", "!die", "b", "c")]
    eventually(lambda: all(call.done() for call in calls), timeout_s=30)
    poisoned = calls.pop(1)
    assert poisoned.code() == grpc.StatusCode.INTERNAL
    assert [call.result().choices[0].message.content for call in calls] == ["a", "b", "c"]


def test_a_spare_worker_takes_over_while_no_other_can_load(
    start_gateway: StartGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spare_worker, "_RETRY_S", 0.01)
    marker = tmp_path / "marker"
    gateway = start_gateway(worker=("--step-delay", "0.02", "--die-if", str(marker)), spare_worker=True)
    supervisor = gateway.gateway.supervisor
    running = gateway.stub.GenerateStream(FOREVER)
    next(running)
    for num_restarts in (1, 2):
        eventually(lambda: supervisor.spare_pid is not None, timeout_s=30)
        spare_pid = supervisor.spare_pid
        marker.touch()
        os.kill(worker_pid(gateway), signal.SIGKILL)
        eventually(lambda pid=spare_pid: supervisor.worker_pid == pid)
        eventually(lambda: supervisor.engine_stats.num_generated_tokens > 0)  # of the worker's own
        assert supervisor.num_restarts == num_restarts
        marker.unlink()
    running.cancel()


def test_a_spare_worker_that_hangs_as_it_loads_is_replaced(
    start_gateway: StartGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spare_worker, "_RETRY_S", 0.01)
    marker = tmp_path / "marker"
    gateway = start_gateway(worker=("--hang-if", str(marker)), spare_worker=True, worker_timeout=0.5)
    supervisor = gateway.gateway.supervisor
    eventually(lambda: supervisor.spare_pid is not None)
    marker.touch()
    assert supervisor.spare_pid is not None
    os.kill(supervisor.spare_pid, signal.SIGKILL)
    eventually(lambda: not marker.exists())  # the next one hangs
    eventually(lambda: supervisor.spare_pid is not None)
    assert supervisor.num_restarts == 0


def test_a_worker_that_only_fails_before_it_dies_is_given_up(start_gateway: StartGateway) -> None:
    gateway = start_gateway(max_worker_restarts=1)
    for num_restarts in (1, 2):
        with pytest.raises(grpc.RpcError) as raised:
            gateway.stub.Generate(ask("!fail-first"), timeout=20)
        assert reason_of(raised.value) == "INTERNAL"
        os.kill(worker_pid(gateway), signal.SIGKILL)
        eventually(lambda expected=num_restarts: gateway.gateway.supervisor.num_restarts == expected)
    eventually(lambda: not gateway.gateway.health.is_serving)


def test_a_worker_that_keeps_dying_is_given_up(start_gateway: StartGateway, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    gateway = start_gateway(worker=("--die-if", str(marker)), max_worker_restarts=1)
    running = gateway.stub.GenerateStream(FOREVER)
    next(running)
    marker.touch()
    os.kill(worker_pid(gateway), signal.SIGKILL)
    with pytest.raises(grpc.RpcError) as raised:
        list(running)
    assert reason_of(raised.value) == "WORKER_LOST"
    gateway.wait_health(NOT_SERVING)
    with pytest.raises(grpc.RpcError) as raised:
        gateway.stub.Generate(ask("x"), timeout=5)
    assert (raised.value.code(), reason_of(raised.value)) == (grpc.StatusCode.UNAVAILABLE, "WORKER_LOST")


def test_first_workers_that_die_as_they_load_are_replaced_until_they_are_too_many(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    marker.touch()
    gateway = start_gateway(worker=("--die-if", str(marker)), max_worker_restarts=1, wait_ready=False)
    gateway.thread.join(20)
    assert str(gateway.error) == "the worker process died 2 times while it loaded the model"


def test_a_service_that_has_no_files_for_a_new_worker_is_back_once_it_has(
    start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(supervisor, "_FIRST_BACKOFF_S", 0.05)
    gateway = start_gateway(max_worker_restarts=1)
    with monkeypatch.context() as all_taken:
        all_taken.setattr(asyncio, "create_subprocess_exec", fail)
        os.kill(worker_pid(gateway), signal.SIGKILL)
        gateway.wait_health(NOT_SERVING)
        with pytest.raises(grpc.RpcError) as raised:
            gateway.stub.Generate(ask("x"), timeout=5)
        assert reason_of(raised.value) == "WORKER_LOST"
    gateway.wait_health(SERVING)
    assert_answers(gateway)


def test_what_cannot_be_imported_ahead_of_its_use_is_no_traceback_in_the_log(
    start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(server, "template_utils", fail)
    start_gateway().stop()
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_no_process_thread_or_task_is_left_over(start_gateway: StartGateway) -> None:
    threads = set(threading.enumerate())
    gateway = start_gateway()
    pid = worker_pid(gateway)
    call = gateway.stub.GenerateStream(FOREVER)
    next(call)
    call.cancel()
    gateway.channel.close()
    gateway.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    eventually(lambda: not [t for t in set(threading.enumerate()) - threads if not t.daemon])
