"""The worker process: reads requests off its socket, loads what `Start` names, then has the engine step, for ever."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import BinaryIO

from parleyd.config import ModelSettings
from parleyd.engine.engine import Engine
from parleyd.errors import StartupError
from parleyd.generation import ModelInfo
from parleyd.ipc import messages
from parleyd.ipc.framing import read_frame, send_frame
from parleyd.model.explain import is_out_of_memory, one_line
from parleyd.telemetry import logging as telemetry_logging

_logger = logging.getLogger("parleyd.worker")

_PROGRESS_INTERVAL_S = 0.1

Load = Callable[[ModelSettings], tuple[Engine, ModelInfo]]


def run(fd: int, load: Load) -> int:
    """Serves the gateway on the other end of `fd` until it goes away. Returns the exit code."""
    _ignore_signals()
    sock = socket.socket(fileno=fd)
    sender, stream = _Sender(sock), sock.makefile("rb")
    payload = read_frame(stream)
    if payload is None:
        return 0
    message = messages.decode_to_worker(payload)
    assert isinstance(message, messages.Start)
    engine: Future[Engine] = Future()
    try:
        telemetry_logging.configure(message.log_level, message.log_format)
        threading.Thread(target=_receive, args=(stream, engine), name="receive", daemon=True).start()
        loaded, info = load(message.settings)
        threading.Thread(target=_tell_progress, args=(loaded, sender), name="progress", daemon=True).start()
    except Exception as error:
        sender.send(messages.LoadFailed(_why_not_loaded(error, message.settings)))
        return 1
    engine.set_result(loaded)
    sender.send(messages.Ready(info))
    try:
        while True:
            sender.send(messages.Step(loaded.step()))
    except Exception:
        _logger.exception("the generate thread failed")
        return 1


def _why_not_loaded(error: Exception, settings: ModelSettings) -> str:
    if isinstance(error, StartupError):
        text = str(error)
    else:
        # Such as numbers that no model can have, which fail anywhere, or too little memory.
        _logger.debug("loading %s failed", settings.model, exc_info=True)
        reason = f"it cannot be served: {one_line(error)} (--log-level debug tells where)"
        if is_out_of_memory(error):
            reason = (
                "too little memory to serve it; choose a smaller model, a smaller type with --dtype, "
                "or a smaller KV cache with --kv-cache-memory"
            )
        text = f"--model {settings.model}: {reason}"
    return text.encode(errors="replace").decode()  # may quote half of a surrogate pair, which no message holds


class _Sender:
    """Messages to the gateway, whole, from whichever thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()

    def send(self, message: messages.ToGateway) -> None:
        payload = messages.encode(message)
        with self._lock:
            send_frame(self._sock, payload)


def _tell_progress(engine: Engine, sender: _Sender) -> None:
    """Sends `Progress` as long as the engine gets on, and nothing while it is idle or hangs."""
    told = None
    while True:
        if (news := (engine.progress, engine.stats())) != told:
            told = news
            sender.send(messages.Progress(stats=news[1], progress=news[0]))
        time.sleep(_PROGRESS_INTERVAL_S)


def _ignore_signals() -> None:
    # A service manager's SIGTERM reaches every process; streams are to finish first, so the gateway alone decides when
    # the worker goes, by closing the socket.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _receive(stream: BinaryIO, engine: Future[Engine]) -> None:
    """Takes the gateway's messages; leaves the process when the gateway is gone, whatever the other threads do."""
    try:
        _take_messages(stream, engine)
        code = 0
    except Exception:
        _logger.exception("the gateway's messages cannot be taken")
        code = 1
    telemetry_logging.flush()
    os._exit(code)


def _take_messages(stream: BinaryIO, engine: Future[Engine]) -> None:
    while (payload := read_frame(stream)) is not None:
        match messages.decode_to_worker(payload):
            case messages.Changes(submitted, aborted):
                for request in submitted:
                    engine.result().submit(request)
                for key in aborted:
                    engine.result().abort(key)
