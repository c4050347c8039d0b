"""What goes wrong with a replica, on purpose. Each failpoint returns once its fault has been dealt out."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress

import grpc

from parleyd.gateway.supervisor import State
from tests.support.gateway import GatewayThread
from tests.support.raw_http2 import begin_raw_stream
from tests.support.requests import ask, reason_of

Failpoint = Callable[[GatewayThread, random.Random], Awaitable[None]]

# Longer than the watchdog's patience in these tests, and a good deal shorter.
WORKER_TIMEOUT_S = 2.0
_SHORT_STOP_S = 0.2
# Of a client that reads nothing, and the shorter patience with it, which must be longer than a busy machine keeps one
# that reads from doing so.
_UNREAD_S = 3.5
SLOW_READER_TIMEOUT_S = 3.0
# Of a client from which nothing comes any more: until the gateway asks whether it is there, and until it takes that for
# no, which must be longer than a busy machine keeps one that is there from answering.
KEEPALIVE_TIME_S = 1.0
KEEPALIVE_TIMEOUT_S = 2.0
_GRACE_S = 10.0
_CALL_TIMEOUT_S = 60.0


async def kill_worker(gateway: GatewayThread, chance: random.Random) -> None:
    """At whatever it is doing, loading included."""
    _signal_worker(gateway, signal.SIGKILL)


async def kill_worker_twice(gateway: GatewayThread, chance: random.Random) -> None:
    """The second as soon as there is one: while it loads, or as it is handed the first one's requests."""
    supervisor = gateway.gateway.supervisor
    first = supervisor.worker_pid
    _signal_worker(gateway, signal.SIGKILL)
    while supervisor.worker_pid in (first, None):
        await asyncio.sleep(0.001)
    await asyncio.sleep(chance.uniform(0, 0.4))
    if not is_anyone_suspected(gateway):
        _signal_worker(gateway, signal.SIGKILL)


async def kill_worker_at_hand_over(gateway: GatewayThread, chance: random.Random) -> None:
    """In the moment in which it has been handed the first one's requests."""
    supervisor = gateway.gateway.supervisor
    first = supervisor.worker_pid
    _signal_worker(gateway, signal.SIGKILL)
    while supervisor.worker_pid in (first, None) or supervisor.state is not State.READY:
        await asyncio.sleep(0.0005)
    if not is_anyone_suspected(gateway):
        _signal_worker(gateway, signal.SIGKILL)


async def stop_worker(gateway: GatewayThread, chance: random.Random) -> None:
    """Until the watchdog has had enough of it."""
    _signal_worker(gateway, signal.SIGSTOP)


async def stop_worker_for_a_moment(gateway: GatewayThread, chance: random.Random) -> None:
    """And let it go again."""
    _signal_worker(gateway, signal.SIGSTOP)
    await asyncio.sleep(_SHORT_STOP_S)
    _signal_worker(gateway, signal.SIGCONT)


async def crash_worker(gateway: GatewayThread, chance: random.Random) -> None:
    """A fault that the operating system reports."""
    _signal_worker(gateway, signal.SIGSEGV)


async def break_engine(gateway: GatewayThread, chance: random.Random) -> None:
    """A step raises what no step can follow, as a lost device does; the worker leaves by itself."""
    response = await asyncio.to_thread(gateway.stub.Generate, ask("!break-at 3 abcdef"), timeout=_CALL_TIMEOUT_S)
    assert response.choices[0].message.content == "abcdef"


async def poison(gateway: GatewayThread, chance: random.Random) -> None:
    """A request that kills every worker it reaches: it alone fails."""
    call = gateway.stub.Generate.future(ask("!die"), timeout=_CALL_TIMEOUT_S)
    error = await asyncio.to_thread(call.exception)
    assert isinstance(error, grpc.RpcError) and reason_of(error) == "INTERNAL"


async def close_ipc(gateway: GatewayThread, chance: random.Random) -> None:
    """The socket pair breaks, and both processes live."""
    worker = gateway.gateway.supervisor._worker
    if worker is not None and worker.link is not None:
        gateway.loop.call_soon_threadsafe(worker.link._writer.transport.abort)


async def vanish(gateway: GatewayThread, chance: random.Random) -> None:
    """A client resets its connection in the middle of an answer."""
    raw = await asyncio.to_thread(begin_raw_stream, gateway.target, "!forever")
    await asyncio.sleep(0.05)
    raw.reset()


async def send_garbage(gateway: GatewayThread, chance: random.Random) -> None:
    """A client that speaks no HTTP/2."""
    host, port = gateway.target.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(os.urandom(512))
    await writer.drain()
    await reader.read(100)
    writer.close()


async def stop_reading(gateway: GatewayThread, chance: random.Random) -> None:
    """A client that takes nothing of its answer."""
    raw = await asyncio.to_thread(begin_raw_stream, gateway.target, "!forever", window=0)
    await asyncio.sleep(_UNREAD_S)
    raw.close()


async def half_open(gateway: GatewayThread, chance: random.Random) -> None:
    """A client whose host vanishes in the middle of an answer: from it comes nothing more, not even that it is gone."""
    with await asyncio.to_thread(begin_raw_stream, gateway.target, "!forever") as raw:
        is_let_go = await asyncio.to_thread(raw.wait_closed, KEEPALIVE_TIME_S + KEEPALIVE_TIMEOUT_S + _GRACE_S)
    assert is_let_go, "its connection is kept"


# The orders of a scripted worker.
SCRIPTED_FAULTS: tuple[Failpoint, ...] = (break_engine, poison)
FAULTS: tuple[Failpoint, ...] = (
    kill_worker,
    kill_worker_twice,
    kill_worker_at_hand_over,
    stop_worker,
    stop_worker_for_a_moment,
    crash_worker,
    close_ipc,
    *SCRIPTED_FAULTS,
    vanish,
    send_garbage,
    stop_reading,
    half_open,
)


def is_anyone_suspected(gateway: GatewayThread) -> bool:
    """Whether a request was the only one to blame for the last death. At another one it would fail, whoever has killed
    the worker: that is the rule (tests/unit/gateway/test_worker_client.py), and no answer lost."""
    return any(entry.num_strikes for entry in list(gateway.gateway.worker._open.values()))


def _signal_worker(gateway: GatewayThread, number: int) -> None:
    pid = gateway.gateway.supervisor.worker_pid
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
