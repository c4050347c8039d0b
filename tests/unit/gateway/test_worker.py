"""What the gateway makes of a worker's messages."""

from __future__ import annotations

import sys

from parleyd.config import ModelSettings
from parleyd.gateway.worker import Worker
from parleyd.generation import EngineStats
from parleyd.ipc.messages import Start

_SCRIPT = """
import socket, sys
from parleyd.generation import EngineStats
from parleyd.ipc.framing import send_frame
from parleyd.ipc.messages import Progress, encode
ours = socket.socket(fileno=int(sys.argv[1]))
for num_waiting, progress in ((0, 0), (0, 1), (1, 1), (2, 1), (1, 2)):
    send_frame(ours, encode(Progress(EngineStats(num_waiting=num_waiting), progress)))
"""


async def test_a_queue_that_grows_behind_a_hang_is_no_sign_of_life() -> None:
    worker = Worker(
        Start(ModelSettings(model="x")), command=(sys.executable, "-c", _SCRIPT), on_outputs=lambda outputs: None
    )
    await worker.gone.wait()
    await worker.ended()
    assert worker.num_signs == 3
    assert worker.stats == EngineStats(num_waiting=1)
