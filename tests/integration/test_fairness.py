"""One client with very much to ask and another with one thing, told apart by their keys, over the wire."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import grpc
import pytest

from parley.v1 import chat_pb2, message_pb2
from parleyd.config import SecuritySettings
from parleyd.security.api_keys import entry_for, new_key
from tests.integration.conftest import StartGateway
from tests.support.gateway import GatewayThread
from tests.support.requests import ask, reason_of

MANY, ONE = new_key(), new_key()


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


@pytest.fixture
def start(start_gateway: StartGateway, tmp_path: Path) -> Any:
    path = tmp_path / "keys.toml"
    path.write_text(entry_for("many", MANY) + entry_for("one", ONE))

    def start(**settings: Any) -> GatewayThread:
        worker = ("--step-delay", "0.002", "--max-running", "2")
        return start_gateway(
            max_running=2, worker=worker, security=SecuritySettings(api_keys=str(path)), refuse_late=False, **settings
        )

    return start


class Watched:
    """Calls that count themselves when they end."""

    def __init__(self) -> None:
        self.num_done = 0
        self.codes: list[grpc.StatusCode] = []
        self._lock = threading.Lock()

    def note(self, call: Any) -> None:
        with self._lock:
            self.num_done += 1
            self.codes.append(call.code())


def wait_for(gateway: GatewayThread, num_waiting: int) -> None:
    pause = threading.Event()
    for _ in range(5000):
        if gateway.gateway.admission.num_waiting >= num_waiting:
            return
        pause.wait(0.002)
    raise AssertionError("never so many")


def test_one_request_passes_the_thousand_of_another_client(start: Any) -> None:
    gateway, many = start(max_queue=2000), Watched()
    calls = [gateway.stub.Generate.future(ask("x" * 20), timeout=100, metadata=bearer(MANY)) for _ in range(1000)]
    for call in calls:
        call.add_done_callback(many.note)
    wait_for(gateway, 600)
    before = many.num_done
    assert gateway.stub.Generate(ask("hi"), timeout=20, metadata=bearer(ONE)).choices[0].message.content == "hi"
    assert many.num_done - before < 50  # a turn or two, and what ended while the call was on its way
    for call in calls:
        call.cancel()
    gateway.wait_idle()


def test_a_batch_of_a_thousand_holds_up_nobody(start: Any) -> None:
    gateway = start(max_queue=1023)
    batch = chat_pb2.GenerateBatchRequest(requests=[ask("x" * 20) for _ in range(1024)])
    outcomes = gateway.stub.GenerateBatch(batch, timeout=100, metadata=bearer(MANY))
    next(outcomes)
    wait_for(gateway, 15)
    answer = gateway.stub.Generate(ask("hi"), timeout=20, metadata=bearer(ONE))
    assert answer.timings.queue.ToTimedelta().total_seconds() < 2.0
    outcomes.cancel()
    gateway.wait_idle()


def test_a_prompt_passes_the_huge_prompts_of_another_client(start: Any) -> None:
    gateway, many = start(max_queue=8), Watched()
    huge = chat_pb2.GenerateRequest(messages=[message_pb2.Message(role=message_pb2.ROLE_USER, content="a")] * 60_001)
    calls = [gateway.stub.Generate.future(huge, timeout=100, metadata=bearer(MANY)) for _ in range(8)]
    for call in calls:
        call.add_done_callback(many.note)
    while not many.num_done:
        threading.Event().wait(0.002)
    before = many.num_done
    assert gateway.stub.Generate(ask("x" * 2500), timeout=60, metadata=bearer(ONE)).choices
    assert many.num_done - before < 3  # the one amid its work, and what ended while the call was on its way
    for call in calls:
        assert call.code() == grpc.StatusCode.INVALID_ARGUMENT
    gateway.wait_idle()


def test_a_newcomer_takes_a_place_from_whoever_fills_the_queue(start: Any) -> None:
    gateway, many = start(max_queue=8), Watched()
    forever = ask("!forever", max_new_tokens=4000)
    held = [gateway.stub.GenerateStream(forever, metadata=bearer(MANY)) for _ in range(2)]
    for call in held:
        next(call)
    waiting = [gateway.stub.Generate.future(ask("x"), timeout=60, metadata=bearer(MANY)) for _ in range(8)]
    for call in waiting:
        call.add_done_callback(many.note)
    wait_for(gateway, 8)
    with pytest.raises(grpc.RpcError) as raised:
        gateway.stub.Generate(ask("x"), timeout=20, metadata=bearer(MANY))
    assert reason_of(raised.value) == "QUEUE_FULL"
    newcomer = gateway.stub.Generate.future(ask("hi"), timeout=60, metadata=bearer(ONE))
    while not many.num_done:
        threading.Event().wait(0.002)
    held[0].cancel()
    assert newcomer.result(20).choices[0].message.content == "hi"
    assert many.codes.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == 1
    held[1].cancel()
    for call in waiting:
        call.cancel()
    gateway.wait_idle()
