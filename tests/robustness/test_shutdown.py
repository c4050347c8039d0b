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
        self._stream = stub.GenerateStream(ask("!forever", max_new_tokens=_NUM_TOKENS))
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
    replica = Replica(folder, "--drain-delay", "0", "--step-delay", "0.01", "--clock-jumps", *arguments)
    try:
        with grpc.insecure_channel(replica.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            reader = _Reader(chat_pb2_grpc.ChatServiceStub(channel))
            yield replica, reader
            reader.join(30)
    finally:
        replica.stop()
    assert_no_orphans(folder)


def _worker(replica: Replica) -> psutil.Process:
    (worker,) = psutil.Process(replica.process.pid).children()
    return worker


def _replacing(replica: Replica) -> None:
    """Kills the worker, and waits for the next one's process, which then loads."""
    worker, gateway = _worker(replica), psutil.Process(replica.process.pid)
    worker.kill()
    eventually(lambda: {child.pid for child in gateway.children()} - {worker.pid}, "there is no new worker")


def test_streams_that_wait_for_a_new_worker_at_sigterm_get_it_and_finish(tokenizer_folder: Path) -> None:
    with _streaming(tokenizer_folder, "--load-delay", "0.5") as (replica, reader):
        _replacing(replica)
        replica.terminate()
        reader.join(10)
        assert (reader.error, len(reader.ids)) == (None, _NUM_TOKENS)


def test_they_end_with_draining_where_it_takes_too_long(tokenizer_folder: Path) -> None:
    with _streaming(tokenizer_folder, "--load-delay", "0.8", "--drain-timeout", "0.2") as (replica, reader):
        _replacing(replica)
        replica.terminate()
        _assert_draining(reader)


def test_a_second_sigterm_ends_them_at_once(tokenizer_folder: Path) -> None:
    with _streaming(tokenizer_folder, "--load-delay", "0.8") as (replica, reader):
        _replacing(replica)
        replica.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert replica.process.poll() is None and reader.is_alive()
        replica.terminate()
        _assert_draining(reader)


def test_a_worker_killed_while_its_streams_finish_is_replaced_for_them(tokenizer_folder: Path) -> None:
    with _streaming(tokenizer_folder) as (replica, reader):
        worker = _worker(replica)
        replica.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        worker.kill()
        assert replica.process.wait(20) == 0
        reader.join(10)
        assert (reader.error, len(reader.ids)) == (None, _NUM_TOKENS)


def test_a_gateway_killed_while_its_worker_is_in_a_step_leaves_none(tokenizer_folder: Path) -> None:
    replica = Replica(tokenizer_folder, "--step-delay", "60")
    with grpc.insecure_channel(replica.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = chat_pb2_grpc.ChatServiceStub(channel).Generate.future(ask("a long step"), timeout=30)
        time.sleep(0.3)
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
