"""One client with very much to ask and another with one thing, told apart by their keys, over the wire."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import grpc
import pytest

from parley.v1 import chat_pb2, message_pb2
from parleyd.config import SecuritySettings
from parleyd.security.new_key import entry_for, new_key
from tests.integration.conftest import StartGateway
from tests.support.eventually import eventually
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
    eventually(lambda: gateway.gateway.admission.num_waiting >= num_waiting, "never so many", timeout_s=30)


def hold_slots(gateway: GatewayThread) -> list[Any]:
    """Calls of one client that keep both slots until they are cancelled."""
    held = [gateway.stub.Generate.future(ask("!wait"), metadata=bearer(MANY)) for _ in range(2)]
    eventually(lambda: gateway.gateway.admission.num_running == 2)
    return held


def assert_newcomer_is_next_but_one(gateway: GatewayThread, held: list[Any]) -> None:
    """Of the slots that `held` give back one goes to who waits for ever already, the other to another client."""
    num_waiting = gateway.gateway.admission.num_waiting
    newcomer = gateway.stub.Generate.future(ask("hi"), metadata=bearer(ONE))
    wait_for(gateway, num_waiting + 1)
    for call in held:
        call.cancel()
    assert newcomer.result(30).choices[0].message.content == "hi"


def test_one_request_passes_the_thousand_of_another_client(start: Any) -> None:
    gateway = start(max_queue=2000)
    held = hold_slots(gateway)
    calls = [gateway.stub.Generate.future(ask("!wait"), metadata=bearer(MANY)) for _ in range(1000)]
    wait_for(gateway, 1000)
    assert_newcomer_is_next_but_one(gateway, held)
    for call in calls:
        call.cancel()
    gateway.wait_idle()


def test_a_batch_of_a_thousand_holds_up_nobody(start: Any) -> None:
    gateway = start(max_queue=1023)
    held = hold_slots(gateway)
    batch = chat_pb2.GenerateBatchRequest(requests=[ask("!wait")] * 1024)
    outcomes = gateway.stub.GenerateBatch(batch, metadata=bearer(MANY))
    wait_for(gateway, 18)  # all that begin at once
    assert_newcomer_is_next_but_one(gateway, held)
    outcomes.cancel()
    gateway.wait_idle()


def test_a_prompt_passes_the_huge_prompts_of_another_client(start: Any) -> None:
    gateway, many = start(max_queue=8), Watched()
    huge = chat_pb2.GenerateRequest(
        messages=[message_pb2.Message(role=message_pb2.ROLE_USER, content="x" * 800)] * 4095
    )
    calls = [gateway.stub.Generate.future(huge, timeout=100, metadata=bearer(MANY)) for _ in range(8)]
    for call in calls:
        call.add_done_callback(many.note)
    eventually(lambda: many.num_done, timeout_s=60)
    before = many.num_done
    assert gateway.stub.Generate(ask("x" * 2500), timeout=60, metadata=bearer(ONE)).choices
    # The one amid its work, and what ended while the call was on its way; behind them it would be all seven.
    assert many.num_done - before < 5
    for call in calls:
        assert call.code() == grpc.StatusCode.INVALID_ARGUMENT
    gateway.wait_idle()


def test_a_newcomer_takes_a_place_from_whoever_fills_the_queue(start: Any) -> None:
    gateway, many = start(max_queue=8), Watched()
    held = hold_slots(gateway)
    waiting = [gateway.stub.Generate.future(ask("x"), timeout=60, metadata=bearer(MANY)) for _ in range(8)]
    for call in waiting:
        call.add_done_callback(many.note)
    wait_for(gateway, 8)
    with pytest.raises(grpc.RpcError) as raised:
        gateway.stub.Generate(ask("x"), timeout=20, metadata=bearer(MANY))
    assert reason_of(raised.value) == "QUEUE_FULL"
    newcomer = gateway.stub.Generate.future(ask("hi"), timeout=60, metadata=bearer(ONE))
    eventually(lambda: many.num_done, timeout_s=60)
    held[0].cancel()
    assert newcomer.result(20).choices[0].message.content == "hi"
    assert many.codes.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == 1
    held[1].cancel()
    for call in waiting:
        call.cancel()
    gateway.wait_idle()
