"""The load report that goes with every status: who gets one, what it counts, what it costs.

Read as a balancer sees them: gRPC's own client keeps load reports from its caller.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import exp
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import h2.events
import pytest
from google.protobuf.message import Message

from parley.v1 import chat_pb2, message_pb2
from parleyd.config import SecuritySettings
from parleyd.errors import EngineFault, InvalidRequest, ParleyError
from parleyd.gateway import observer
from parleyd.gateway.observer import Observer
from parleyd.generation import EngineStats
from parleyd.security.new_key import entry_for, new_key
from tests.integration.conftest import StartGateway
from tests.support.errors import EXAMPLES
from tests.support.gateway import GatewayThread
from tests.support.orca import OrcaLoadReport
from tests.support.raw_http2 import RawConnection
from tests.support.requests import ask

OK, INVALID_ARGUMENT, DEADLINE_EXCEEDED, NOT_FOUND, PERMISSION_DENIED = "0", "3", "4", "5", "7"
RESOURCE_EXHAUSTED, FAILED_PRECONDITION, INTERNAL, UNAVAILABLE, UNAUTHENTICATED = "8", "9", "13", "14", "16"
FOREVER = ask("!forever", max_new_tokens=4000)
TOOLS = [message_pb2.Tool(name="clock")]
FAULTS_HERE = {"QueueFull", "DeadlineExceeded", "NotReady", "Draining", "WorkerLost", "EngineFault"}


@pytest.fixture
def gateway(start_gateway: StartGateway) -> GatewayThread:
    """One of the test's own, that has answered and refused nothing yet."""
    return start_gateway(max_running=2, max_queue=0)


def batch(*requests: chat_pb2.GenerateRequest) -> chat_pb2.GenerateBatchRequest:
    return chat_pb2.GenerateBatchRequest(requests=requests)


def report_in(trailers: dict[str, str] | None) -> Any:
    """The load report; None where there is none."""
    value = (trailers or {}).get("endpoint-load-metrics-bin")
    if value is None:
        return None
    return OrcaLoadReport.FromString(base64.b64decode(value + "=" * (-len(value) % 4)))


def ended(gateway: GatewayThread, method: str, request: Message, **headers: str) -> tuple[str, Any]:
    """A call's status code and load report."""
    with RawConnection(gateway.target) as connection:
        connection.call(method, request, headers)
        trailers = connection.trailers()
    assert trailers is not None
    return trailers["grpc-status"], report_in(trailers)


@contextmanager
def held(gateway: GatewayThread, number: int) -> Iterator[None]:
    """So many slots, by answers that go on for ever."""
    calls = [gateway.stub.GenerateStream(FOREVER) for _ in range(number)]
    for call in calls:
        next(call)
    yield
    for call in calls:
        call.cancel()


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("Generate", ask("hello")),
        ("GenerateStream", ask("hello")),
        ("GenerateBatch", batch(ask("hello"), ask("!fail"))),
        ("CountTokens", chat_pb2.CountTokensRequest(messages=ask("hello").messages)),
        ("GetModel", chat_pb2.GetModelRequest()),
    ],
)
def test_answers_carry_a_load_report(gateway: GatewayThread, method: str, request_: Message) -> None:
    with held(gateway, 1):
        code, report = ended(gateway, method, request_)
    assert (code, report.eps) == (OK, 0)
    assert 0 < report.application_utilization <= 1
    assert report.rps_fractional == pytest.approx(0.1, rel=0.2)
    assert report.named_metrics["queue_depth"] == 0


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
@pytest.mark.parametrize(
    ("request_", "code", "is_ours"),
    [
        (ask("x", temperature=99), INVALID_ARGUMENT, False),
        (ask("x" * 5000), INVALID_ARGUMENT, False),
        (ask("x", model="another"), NOT_FOUND, False),
        (ask("x", tools=TOOLS), FAILED_PRECONDITION, False),
        (ask("!fail"), INTERNAL, True),
        (ask("x", num_return_sequences=3, temperature=1), RESOURCE_EXHAUSTED, True),
    ],
)
def test_failed_calls_carry_one_and_only_faults_of_the_server_are_errors(
    gateway: GatewayThread, method: str, request_: Message, code: str, is_ours: bool
) -> None:
    with held(gateway, 1):
        ended_as, report = ended(gateway, method, request_)
    assert ended_as == code
    assert 0 < report.application_utilization <= 1
    assert report.eps == pytest.approx(0.1 if is_ours else 0, rel=0.2)
    assert report.rps_fractional > 0  # or balancers would pass over it


def test_a_batch_that_is_refused_carries_one(gateway: GatewayThread) -> None:
    code, report = ended(gateway, "GenerateBatch", batch())
    assert (code, report.eps) == (INVALID_ARGUMENT, 0)


def test_each_refusal_of_a_full_replica_lowers_its_weight(gateway: GatewayThread) -> None:
    with held(gateway, 2):
        codes, reports = zip(*[ended(gateway, "Generate", ask("x")) for _ in range(3)], strict=True)
    assert codes == (RESOURCE_EXHAUSTED,) * 3
    # As gRPC and Envoy reckon it.
    weights = [
        each.rps_fractional / (each.application_utilization + each.eps / each.rps_fractional) for each in reports
    ]
    assert weights == sorted(weights, reverse=True) and 0 < weights[2] < weights[0] / 1.5


def test_what_clients_end_themselves_is_no_error(gateway: GatewayThread) -> None:
    with held(gateway, 1):
        pass
    with pytest.raises(grpc.RpcError) as raised:
        list(gateway.stub.GenerateStream(FOREVER, timeout=0.3))
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    gateway.wait_idle()
    assert ended(gateway, "GetModel", chat_pb2.GetModelRequest())[1].eps == 0


def test_a_clients_own_limit_is_no_error(start_gateway: StartGateway) -> None:
    gateway = start_gateway(security=SecuritySettings(requests_per_minute=1))
    assert ended(gateway, "Generate", ask("x"))[0] == OK
    code, report = ended(gateway, "Generate", ask("x"))
    assert (code, report.eps) == (RESOURCE_EXHAUSTED, 0)


def test_a_deadline_that_the_queue_makes_impossible_is_an_error(start_gateway: StartGateway) -> None:
    gateway = start_gateway(worker=("--step-delay", "0.02"), max_running=1, max_queue=8)
    for _ in range(8):
        gateway.stub.Generate(ask("0123456789"), timeout=20)
    with held(gateway, 1):
        waiting = [gateway.stub.Generate.future(ask("x", priority=1)) for _ in range(6)]
        deadline = time.monotonic() + 10
        while gateway.gateway.admission.num_waiting < len(waiting):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        code, report = ended(gateway, "Generate", ask("x"), **{"grpc-timeout": "200m"})
        for call in waiting:
            call.cancel()
    assert (code, report.named_metrics["queue_depth"]) == (DEADLINE_EXCEEDED, len(waiting))
    assert report.eps > 0


def test_a_replica_that_is_not_ready_says_so_in_reports(start_gateway: StartGateway) -> None:
    gateway = start_gateway(worker=("--load-delay", "3"), wait_ready=False)
    for number, method in enumerate(("Generate", "GenerateStream", "GenerateBatch"), 1):
        code, report = ended(gateway, method, chat_pb2.GenerateRequest())
        assert code == UNAVAILABLE
        assert report.eps == pytest.approx(number / 10, rel=0.3)
    gateway.wait_health(1)


@pytest.mark.parametrize(
    ("method", "request_"), [("GenerateStream", FOREVER), ("GenerateBatch", batch(ask("x"), FOREVER))]
)
def test_a_stream_that_breaks_off_carries_one(gateway: GatewayThread, method: str, request_: Message) -> None:
    with RawConnection(gateway.target) as connection:
        connection.call(method, request_)
        connection.receive_for(10, until=lambda: connection.saw(h2.events.DataReceived))
        for _ in range(2):  # the second does not wait for open calls
            gateway.loop.call_soon_threadsafe(gateway.gateway.begin_shutdown)
        trailers = connection.trailers()
    assert trailers is not None and report_in(trailers) is not None
    # Of a batch, what is open ends each with an error of its own.
    assert trailers["grpc-status"] == (UNAVAILABLE if method == "GenerateStream" else OK)


def test_each_status_has_one_report_made(gateway: GatewayThread) -> None:
    observer, made = gateway.gateway.observer, []
    load = observer._load
    observer._load = lambda: made.append(None) or load()
    calls = [
        ("Generate", ask("hello")), ("GenerateStream", ask("a long answer of many tokens")), ("Generate", ask("!fail")),
        ("GenerateBatch", batch(*[ask("x")] * 20)), ("Generate", ask("x", temperature=99)),
    ]  # fmt: skip
    for number, (method, request) in enumerate(calls, 1):
        ended(gateway, method, request)
        assert len(made) == number


def test_strangers_are_not_told_the_load(start_gateway: StartGateway, tmp_path: Path) -> None:
    key = new_key()
    (tmp_path / "keys.toml").write_text(entry_for("one", key) + 'rpcs = ["GetModel"]\n')
    gateway = start_gateway(security=SecuritySettings(api_keys=str(tmp_path / "keys.toml")))
    assert ended(gateway, "GetModel", chat_pb2.GetModelRequest()) == (UNAUTHENTICATED, None)
    code, report = ended(gateway, "Generate", ask("x"), authorization=f"Bearer {key}")
    assert (code, report.eps) == (PERMISSION_DENIED, 0)


@pytest.mark.parametrize("error", EXAMPLES.values(), ids=lambda error: type(error).__name__)
def test_every_error_is_one_of_ours_or_of_the_clients(shared_gateway: GatewayThread, error: ParleyError) -> None:
    observer = Observer(shared_gateway.gateway.load)
    report = OrcaLoadReport.FromString(observer.load_report(error))
    assert (report.eps > 0) == (type(error).__name__ in FAULTS_HERE)


def test_the_kv_blocks_in_use_are_told(shared_gateway: GatewayThread) -> None:
    load = replace(shared_gateway.gateway.load(), engine=EngineStats(num_blocks=8, num_used_blocks=2))
    report = OrcaLoadReport.FromString(Observer(lambda: load).load_report(None))
    assert report.mem_utilization == report.named_metrics["kv_cache_usage"] == 0.25


def test_rates_fade_and_that_of_answers_never_to_nothing(
    shared_gateway: GatewayThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(observer, "time", SimpleNamespace(monotonic=lambda: clock.now))
    observing = Observer(shared_gateway.gateway.load)
    for error in (*[None] * 50, *[EngineFault("a bug")] * 50):
        observing.load_report(error)
    for now, least in ((10.0, 0.0), (20.0, 0.0), (1000.0, 0.1)):
        clock.now = now
        report = OrcaLoadReport.FromString(observing.load_report(EXAMPLES[InvalidRequest]))
        assert report.rps_fractional == pytest.approx(max(5.0 * exp(-now / 10), least))
        assert report.eps == pytest.approx(5.0 * exp(-now / 10))
