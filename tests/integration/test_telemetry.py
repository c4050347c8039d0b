"""What operators see on the admin port: metrics and probes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import socketserver
import struct
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from prometheus_client.parser import text_string_to_metric_families

from parley.v1 import chat_pb2
from parleyd.config import ServerSettings, Settings
from parleyd.errors import StartupError
from parleyd.gateway.served_model import ServedModel
from parleyd.gateway.server import Gateway
from parleyd.gateway.supervisor import State
from parleyd.generation import EngineStats
from parleyd.rpc import status
from parleyd.telemetry import admin
from parleyd.telemetry.metrics import Load, Metrics
from tests.integration.conftest import StartGateway
from tests.support.eventually import eventually
from tests.support.gateway import GatewayThread
from tests.support.raw_http2 import open_socket
from tests.support.requests import ask

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
FOREVER = ask("!forever", max_new_tokens=4000)


@pytest.fixture
def observed(start_gateway: StartGateway) -> GatewayThread:
    # Slow enough that FOREVER is not over before it is cancelled.
    return start_gateway(worker=("--step-delay", "0.001"), max_running=2, max_queue=0, admin_port=0)


def get(gateway: GatewayThread, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{gateway.admin}{path}", timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, ""


def samples(gateway: GatewayThread) -> dict[tuple[str, tuple[str, ...]], float]:
    status, text = get(gateway, "/metrics")
    assert status == 200
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_tell_what_was_served_and_refused(observed: GatewayThread) -> None:
    for _ in range(3):
        observed.stub.Generate(ask("0123456789"), timeout=10)
    with pytest.raises(grpc.RpcError):
        observed.stub.Generate(ask("!fail-first"), timeout=10)
    held = [observed.stub.GenerateStream(ask("!forever", max_new_tokens=4000)) for _ in range(2)]
    for call in held:
        next(call)
    with pytest.raises(grpc.RpcError):
        observed.stub.Generate(ask("x"), timeout=10)
    seen = samples(observed)
    assert seen["parley_running_requests", ()] == seen["vllm:num_requests_running", ("scripted",)] == 2
    assert seen["parley_open_calls", ()] == 2
    for call in held:
        call.cancel()
    observed.wait_idle()
    seen = samples(observed)
    assert seen["parley_requests_total", ("OK", "Generate")] == 3
    assert seen["parley_requests_total", ("RESOURCE_EXHAUSTED", "Generate")] == 1
    assert seen["parley_requests_total", ("INTERNAL", "Generate")] == 1
    assert seen["parley_requests_total", ("CANCELLED", "GenerateStream")] == 2
    assert seen["parley_rejected_requests_total", ("QUEUE_FULL",)] == 1
    assert seen["gen_ai_server_time_to_first_token_seconds_count", ()] == 5
    assert seen["gen_ai_server_time_per_output_token_seconds_count", ()] >= 30
    assert seen["parley_queue_time_seconds_count", ()] == 6
    assert seen["parley_running_requests", ()] == seen["parley_open_calls", ()] == 0
    assert seen["parley_serving", ()] == 1


def test_an_unexpected_exception_counts_as_internal(observed: GatewayThread, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(ServedModel, "check_request", fail)
    with pytest.raises(grpc.RpcError):
        observed.stub.Generate(ask("x"), timeout=10)
    eventually(lambda: samples(observed).get(("parley_rejected_requests_total", ("INTERNAL",))) == 1)


def test_a_call_that_ends_as_it_is_refused_counts_by_how_it_ended(
    observed: GatewayThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_status = status.to_status

    def after_the_deadline(*args: Any) -> Any:
        time.sleep(0.3)
        return to_status(*args)

    monkeypatch.setattr(status, "to_status", after_the_deadline)
    with pytest.raises(grpc.RpcError):
        observed.stub.Generate(ask("x", temperature=99), timeout=0.15)
    observed.wait_idle()
    eventually(lambda: samples(observed).get(("parley_requests_total", ("DEADLINE_EXCEEDED", "Generate"))) == 1)


def test_each_number_of_the_load_has_its_own_name() -> None:
    engine = EngineStats(
        num_blocks=8, num_used_blocks=2, num_prompt_tokens=7, num_cached_prompt_tokens=8, num_generated_tokens=9,
        num_preemptions=10,
    )  # fmt: skip
    load = Load(
        model="m", num_open_calls=1, num_waiting=2, num_running=3, max_running=4, is_serving=True,
        num_worker_restarts=5, num_handed_over=6, engine=engine,
    )  # fmt: skip
    shown = {
        sample.name: sample.value
        for family in Metrics(lambda: load).registry.collect()
        for sample in family.samples
        if sample.name.startswith(("parley_", "vllm:")) and not sample.name.endswith("_created")
    }
    assert {name: value for name, value in shown.items() if value} == {
        "parley_serving": 1, "parley_open_calls": 1, "parley_queue_depth": 2, "parley_running_requests": 3,
        "parley_max_running_requests": 4, "parley_kv_cache_usage_ratio": 0.25, "parley_worker_restarts_total": 5,
        "parley_handed_over_streams_total": 6, "parley_prompt_tokens_total": 7, "parley_cached_prompt_tokens_total": 8,
        "parley_generated_tokens_total": 9, "parley_preemptions_total": 10, "vllm:num_requests_waiting": 2,
        "vllm:num_requests_running": 3, "vllm:kv_cache_usage_perc": 0.25,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["parley_serving", "parley_requests_total", "process_open_fds"])
def test_a_scrape_for_one_metric_gets_that_one(observed: GatewayThread, name: str) -> None:
    observed.stub.Generate(ask("hello"), timeout=10)
    observed.wait_idle()
    _, text = get(observed, f"/metrics?name[]={name}")
    assert [line.split("{")[0].split()[0] for line in text.splitlines() if not line.startswith("#")] == [name]


def test_what_a_dead_worker_told_of_its_engine_is_forgotten(start_gateway: StartGateway) -> None:
    gateway = start_gateway(worker=("--step-delay", "0.001"), admin_port=0, max_worker_restarts=0)
    stream = gateway.stub.GenerateStream(FOREVER, timeout=60)
    next(stream)
    usage = "parley_kv_cache_usage_ratio", ()
    eventually(lambda: samples(gateway)[usage] > 0)
    pid = gateway.gateway.supervisor.worker_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(grpc.RpcError):
        list(stream)
    assert samples(gateway)[usage] == 0


def test_a_request_counts_once_however_many_answers_it_asks_for(observed: GatewayThread) -> None:
    observed.stub.Generate(ask("hello", num_return_sequences=2, do_sample=True), timeout=10)
    seen = samples(observed)
    for name in ("parley_queue_time", "gen_ai_server_time_to_first_token"):
        assert seen[f"{name}_seconds_count", ()] == 1
    assert seen["parley_request_prompt_tokens_count", ()] == 1
    assert seen["gen_ai_server_time_per_output_token_seconds_count", ()] == 2 * len("hello")


def test_answers_that_go_on_behind_ids_that_the_client_has_are_counted(observed: GatewayThread) -> None:
    for token_ids in (b"", b"he"):
        observed.stub.Generate(ask("hello", resume=chat_pb2.Resume(token_ids=token_ids)), timeout=10)
    assert samples(observed)["parley_resumed_streams_total", ()] == 1


def test_each_item_of_a_batch_counts(observed: GatewayThread) -> None:
    requests = [ask("a"), ask("b"), ask("c", temperature=99)]
    list(observed.stub.GenerateBatch(chat_pb2.GenerateBatchRequest(requests=requests), timeout=10))
    held = observed.stub.GenerateBatch(chat_pb2.GenerateBatchRequest(requests=[ask("d"), FOREVER]), timeout=10)
    next(held)
    held.cancel()
    observed.wait_idle()
    with pytest.raises(grpc.RpcError):
        list(observed.stub.GenerateBatch(chat_pb2.GenerateBatchRequest(requests=[FOREVER]), timeout=0.3))
    observed.wait_idle()
    seen = samples(observed)
    assert seen["parley_batch_items_total", ("OK",)] == 3
    assert seen["parley_batch_items_total", ("INVALID_ARGUMENT",)] == 1
    assert seen["parley_batch_items_total", ("CANCELLED",)] == 1
    assert seen["parley_batch_items_total", ("DEADLINE_EXCEEDED",)] == 1
    assert seen["parley_rejected_requests_total", ("INVALID_REQUEST",)] == 1
    assert seen["parley_requests_total", ("OK", "GenerateBatch")] == 1
    assert seen["gen_ai_server_time_to_first_token_seconds_count", ()] == 5


def test_a_call_that_is_over_before_its_refusal_counts_as_what_its_client_saw(observed: GatewayThread) -> None:
    observed.stub.Generate(ask("hello"), timeout=10)  # the connection is there
    for i in range(100):
        with pytest.raises(grpc.RpcError):
            observed.stub.Generate(FOREVER, timeout=0.00005 * i)
    observed.wait_idle()
    codes = {labels[0] for name, labels in samples(observed) if name == "parley_requests_total"}
    assert codes == {"OK", "DEADLINE_EXCEEDED"}


def test_metrics_tell_of_the_worker(observed: GatewayThread) -> None:
    observed.stub.Generate(ask("!die-at 5 0123456789"), timeout=20)
    seen = samples(observed)
    assert seen["parley_worker_restarts_total", ()] == seen["parley_handed_over_streams_total", ()] == 1
    eventually(lambda: samples(observed)["parley_generated_tokens_total", ()] > len("56789"))


def test_probes_follow_the_service(start_gateway: StartGateway) -> None:
    gateway = start_gateway(worker=("--load-delay", "1"), wait_ready=False, admin_port=0)
    assert (get(gateway, "/healthz")[0], get(gateway, "/readyz")[0], get(gateway, "/else")[0]) == (200, 503, 404)
    gateway.wait_health(1)
    assert get(gateway, "/readyz")[0] == 200


def test_a_service_that_has_given_up_is_no_longer_alive(start_gateway: StartGateway) -> None:
    gateway = start_gateway(max_worker_restarts=0, admin_port=0)
    assert get(gateway, "/healthz")[0] == 200
    os.kill(gateway.gateway.supervisor.worker_pid or 0, signal.SIGKILL)
    gateway.wait_health(NOT_SERVING)
    eventually(lambda: get(gateway, "/healthz")[0] == 503)


def test_a_model_that_is_ready_only_after_sigterm_brings_no_traffic(start_gateway: StartGateway) -> None:
    gateway = start_gateway(worker=("--load-delay", "1"), wait_ready=False, drain_delay=60, admin_port=0)
    gateway.loop.call_soon_threadsafe(gateway.gateway.begin_shutdown)
    eventually(lambda: gateway.gateway.supervisor.state is State.READY)
    assert gateway.health.Check(health_pb2.HealthCheckRequest(), timeout=5).status == NOT_SERVING
    assert get(gateway, "/readyz")[0] == 503
    assert samples(gateway)["parley_serving", ()] == 0


def test_connections_held_open_to_the_admin_port_keep_no_probe_out_and_take_few_threads(
    observed: GatewayThread,
) -> None:
    before = threading.active_count()
    with ExitStack() as stack:
        for _ in range(200):
            held = stack.enter_context(open_socket(str(observed.admin)))
            held.sendall(b"GET /healthz HTTP/1.0\r\nX: ")
        observed.stub.Generate(ask("hello"), timeout=10)
        for _ in range(3):
            assert get(observed, "/healthz")[0] == 200
        assert threading.active_count() <= before + admin._MAX_CONNECTIONS + 4


def test_an_admin_connection_is_cut_off_however_busily_it_drips(
    observed: GatewayThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "_REQUEST_TIMEOUT_S", 1.0)
    with open_socket(str(observed.admin)) as dripping:
        dripping.sendall(b"GET /healthz HTTP/1.0\r\nX: ")
        deadline = time.monotonic() + 10
        with pytest.raises(OSError):
            while time.monotonic() < deadline:
                dripping.sendall(b"a")
                time.sleep(0.05)


def test_threads_that_do_not_start_take_no_place_of_the_admin_port_for_good(
    observed: GatewayThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if "process_request" in thread.name:
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(admin._MAX_CONNECTIONS):
            with open_socket(str(observed.admin)) as refused:
                assert refused.recv(1) == b""
    assert get(observed, "/healthz")[0] == 200


def test_a_connection_that_no_file_is_left_for_takes_no_processor(
    observed: GatewayThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []

    def fail(*args: object) -> None:
        attempts.append(args)
        raise OSError("Too many open files")

    assert observed.admin is not None
    with monkeypatch.context() as all_taken:
        all_taken.setattr(socketserver.TCPServer, "get_request", fail)
        with open_socket(observed.admin):
            time.sleep(0.5)
    assert 0 < len(attempts) < 10


def test_an_admin_connection_that_breaks_leaves_no_trace(
    observed: GatewayThread, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        with open_socket(str(observed.admin)) as broken:
            broken.sendall(b"GET /metrics HTTP/1.0\r\n")
            broken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # ends with a reset
    assert get(observed, "/healthz")[0] == 200  # so the others have been accepted
    deadline = time.monotonic() + 10
    while any("process_request" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "Error" not in capfd.readouterr().err


def test_a_header_that_cannot_be_understood_is_told_in_one_line(
    observed: GatewayThread, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    request = urllib.request.Request(
        f"http://{observed.admin}/metrics", headers={"Accept": "application/openmetrics-text; version=new"}
    )
    with pytest.raises(urllib.error.HTTPError, match="500") as raised:
        urllib.request.urlopen(request, timeout=10)
    raised.value.close()
    assert "Traceback" not in capfd.readouterr().err
    assert "/metrics failed: TypeError" in caplog.text


def test_an_admin_port_beyond_this_machine_must_be_asked_for() -> None:
    async def build() -> None:
        Gateway(Settings(server=ServerSettings(port=0, admin_port=0, admin_host="0.0.0.0")))

    with pytest.raises(StartupError, match="--admin-host"):
        asyncio.run(build())


def test_the_admin_port_may_have_an_ipv6_address(start_gateway: StartGateway) -> None:
    gateway = start_gateway(admin_port=0, admin_host="::1")
    assert gateway.admin.startswith("[::1]:")
    assert get(gateway, "/healthz")[0] == 200


def test_an_admin_port_in_use_stops_the_start(observed: GatewayThread) -> None:
    from parleyd.telemetry.admin import AdminServer

    host, port = observed.admin.split(":")
    with pytest.raises(StartupError, match=f"{host}:{port}"):
        AdminServer(host, int(port), observed.gateway.observer.metrics.registry, lambda: True, lambda: True)
