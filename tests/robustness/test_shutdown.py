"""A replica process told to go while things go wrong: its streams, its exit code, and what is left of it.

All the while its wall clock jumps, which must change nothing.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from parley.v1 import chat_pb2, chat_pb2_grpc
from tests.robustness.validators import assert_no_orphans
from tests.support.eventually import eventually
from tests.support.replica import Replica
from tests.support.requests import ask, reason_of

_NUM_TOKENS = 100


class _Reader(threading.Thread):
    """Reads one stream to its end: `ids`, and the `error` that it ended with, if any."""

    def __init__(self, stub: chat_pb2_grpc.ChatServiceStub) -> None:
        super().__init__()
        # Without a deadline: gRPC's core keeps the true time, where Python's may jump.
        self._stream = stub.GenerateStream(ask("!hang-at 10 " + "x" * _NUM_TOKENS, max_new_tokens=_NUM_TOKENS))
        self.ids = list(next(self._stream).token_ids)
        self.error: grpc.RpcError | None = None
        self.start()

    def run(self) -> None:
        try:
            for response in self._stream:
                self.ids += response.token_ids
        except grpc.RpcError as error:
            self.error = error


@contextmanager
def _streaming(folder: Path, *arguments: str) -> Iterator[tuple[Replica, _Reader]]:
    """A replica and a stream, whose worker has stopped in its midst: it does not end before the worker is killed."""
    replica = Replica(folder, "--drain-delay", "0", "--step-delay", "0.01", "--clock-jumps", *arguments)
    try:
        with grpc.insecure_channel(replica.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            reader = _Reader(chat_pb2_grpc.ChatServiceStub(channel))
            worker = _worker(replica)
            eventually(lambda: worker.status() == psutil.STATUS_STOPPED, "the worker goes on")
            yield replica, reader
            reader.join(30)
    finally:
        replica.stop()
    assert_no_orphans(folder)


def _worker(replica: Replica) -> psutil.Process:
    (worker,) = psutil.Process(replica.process.pid).children()
    return worker


def _tell_to_go(replica: Replica) -> None:
    """SIGTERM; returns once the replica says that it goes."""
    with grpc.insecure_channel(replica.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        next(watch)
        replica.process.send_signal(signal.SIGTERM)
        for response in watch:
            if response.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                return
    raise AssertionError("the watch ended")


def _replacing(replica: Replica) -> None:
    """Kills the worker, and waits for the next one's process, which then loads."""
    worker, gateway = _worker(replica), psutil.Process(replica.process.pid)
    worker.kill()
    eventually(lambda: {child.pid for child in gateway.children()} - {worker.pid}, "there is no new worker")


def test_streams_that_wait_for_a_new_worker_at_sigterm_get_it_and_finish(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    hold = tmp_path / "hold"
    with _streaming(tokenizer_folder, "--hold-if", str(hold)) as (replica, reader):
        hold.touch()
        _replacing(replica)
        _tell_to_go(replica)
        assert reader.is_alive()
        hold.unlink()
        assert replica.process.wait(60) == 0
        reader.join(10)
        assert (reader.error, len(reader.ids)) == (None, _NUM_TOKENS)


def test_they_end_with_draining_where_it_takes_too_long(tokenizer_folder: Path, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    with _streaming(tokenizer_folder, "--hold-if", str(hold), "--drain-timeout", "0.2") as (replica, reader):
        hold.touch()
        _replacing(replica)
        replica.terminate()
        _assert_draining(reader)


def test_a_second_sigterm_ends_them_at_once(tokenizer_folder: Path, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    with _streaming(tokenizer_folder, "--hold-if", str(hold), "--drain-timeout", "600") as (replica, reader):
        hold.touch()
        _replacing(replica)
        _tell_to_go(replica)
        time.sleep(0.2)
        assert replica.process.poll() is None and reader.is_alive()
        replica.terminate()
        _assert_draining(reader)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_terminal_that_closes_has_streams_finish_however_often_it_says_so(
    tokenizer_folder: Path, number: signal.Signals
) -> None:
    with _streaming(tokenizer_folder) as (replica, reader):
        for each in (signal.SIGHUP, number, signal.SIGHUP):
            replica.process.send_signal(each)
        _worker(replica).resume()
        assert replica.process.wait(60) == 0
        reader.join(10)
        assert (reader.error, len(reader.ids)) == (None, _NUM_TOKENS)


def test_nohup_has_the_service_stay(tokenizer_folder: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        replica = Replica(tokenizer_folder, "--drain-delay", "0")
    finally:
        signal.signal(signal.SIGHUP, before)
    try:
        replica.process.send_signal(signal.SIGHUP)
        with grpc.insecure_channel(replica.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            assert chat_pb2_grpc.ChatServiceStub(channel).Generate(ask("x"), timeout=10).choices
        replica.terminate()
    finally:
        replica.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_that_go_on_to_the_very_end_change_nothing(tokenizer_folder: Path, number: signal.Signals) -> None:
    replica = Replica(tokenizer_folder, "--drain-delay", "0", "--drain-timeout", "0")
    try:
        while replica.process.poll() is None:
            replica.process.send_signal(number)
            time.sleep(0.002)
        assert replica.process.returncode == 0
    finally:
        replica.stop()


def test_a_worker_killed_while_its_streams_finish_is_replaced_for_them(tokenizer_folder: Path) -> None:
    with _streaming(tokenizer_folder) as (replica, reader):
        _tell_to_go(replica)
        assert reader.is_alive()
        _worker(replica).kill()
        assert replica.process.wait(60) == 0
        reader.join(10)
        assert (reader.error, len(reader.ids)) == (None, _NUM_TOKENS)


def test_a_gateway_killed_while_its_worker_is_in_a_step_leaves_none(tokenizer_folder: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    replica = Replica(tokenizer_folder, "--step-delay", "60")
    with grpc.insecure_channel(replica.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = chat_pb2_grpc.ChatServiceStub(channel).Generate.future(ask(f"!touch {begun}"), timeout=60)
        eventually(begun.exists, "the step never began", timeout_s=30)
        replica.kill()
        assert call.code() is grpc.StatusCode.UNAVAILABLE
    assert_no_orphans(tokenizer_folder)


def test_no_call_is_cancelled_by_a_server_that_goes(tokenizer_folder: Path) -> None:
    replica = Replica(tokenizer_folder, "--drain-delay", "0")
    try:
        codes = asyncio.run(_codes_while_it_goes(replica))
    finally:
        replica.stop()
    print(codes)
    assert codes.keys() == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}


async def _codes_while_it_goes(replica: Replica, num_clients: int = 16) -> Counter[grpc.StatusCode]:
    """How the calls end of clients that make one after the other, and none twice, while the replica is told to go."""
    codes = Counter[grpc.StatusCode]()
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]

    async def ask_on(stub: chat_pb2_grpc.ChatServiceStub) -> None:
        while not going.done():
            call = stub.CountTokens(chat_pb2.CountTokensRequest(messages=ask("x").messages))
            code = await call.code()
            codes[code] += 1
            await asyncio.sleep(0 if code is grpc.StatusCode.OK else 0.001)

    async with grpc.aio.insecure_channel(replica.address, options) as channel:
        going = asyncio.create_task(asyncio.to_thread(lambda: (time.sleep(0.5), replica.terminate())))
        await asyncio.gather(*(ask_on(chat_pb2_grpc.ChatServiceStub(channel)) for _ in range(num_clients)))
    return codes


def _assert_draining(reader: _Reader) -> None:
    reader.join(10)
    assert reader.error is not None and reason_of(reader.error) == "DRAINING"
