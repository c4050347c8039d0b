"""A process of ours as the gateway holds it, worker or checker: started, spoken to over a socket pair, killed."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress

from parleyd.generation import EngineRequest
from parleyd.ipc import messages
from parleyd.ipc.framing import frame, read_frame_async

# -P: nothing is imported from the folder that the service happens to be started in.
WORKER_COMMAND = (sys.executable, "-P", "-m", "parleyd.worker")

_STOP_TIMEOUT_S = 5.0
_STDERR_FD = 2
# Ids and characters after which a message takes no further request: it is made in one go, while the event loop waits.
_MAX_LENGTH = 256 * 1024


class WorkerLink:
    """A live process. `receive` answers None once it is gone."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._submitted: dict[int, EngineRequest] = {}
        self._aborted: list[int] = []
        self._sending: asyncio.Task[None] | None = None
        self.num_submitted = 0  # requests that it has been sent
        self.is_killed = False  # by us

    @classmethod
    async def start(cls, command: Sequence[str]) -> WorkerLink:
        """Starts a process. Its last argument is the file descriptor of its end of the socket pair."""
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_connection(sock=ours)
            try:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    str(theirs.fileno()),
                    pass_fds=[theirs.fileno()],
                    stdin=asyncio.subprocess.DEVNULL,
                    # Stdout belongs to the gateway's one line; whatever a library prints in the worker goes to stderr.
                    stdout=_STDERR_FD,
                    # A terminal's Ctrl-C is the gateway's: it reaches who shares its group, also amid its imports. No
                    # session of its own: where Linux shares out processors by session, each would get half of them.
                    process_group=0,
                    cwd=_folder(),
                )
            except BaseException:
                writer.close()
                raise
        return cls(process, reader, writer)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_behind(self) -> bool:
        """Whether it has yet to take what it was sent, beyond what the socket holds."""
        return self._writer.transport.get_write_buffer_size() > 0

    def send(self, message: messages.ToWorker | messages.CheckGrammar) -> None:
        """Queues a message. A worker that is gone takes it silently: `receive` tells."""
        if not self._writer.is_closing():
            self._writer.write(frame(messages.encode(message)))

    def submit(self, request: EngineRequest) -> None:
        """Has a request generated: told in one message with all that changes before the loop's next turn, or for as
        long as the worker takes nothing; after that one, where the message is long already."""
        self._send_changes_soon()
        self._submitted[request.key] = request

    def abort(self, key: int) -> None:
        """Has nothing more generated for a request; told as in `submit`, unless the worker never hears of it."""
        if self._submitted.pop(key, None) is None:
            self._send_changes_soon()
            self._aborted.append(key)

    async def receive(self) -> messages.ToGateway | None:
        """The worker's next message, or None when it is gone."""
        payload = await read_frame_async(self._reader)
        return None if payload is None else messages.decode_to_gateway(payload)

    def _send_changes_soon(self) -> None:
        if self._sending is None:
            self._sending = asyncio.create_task(self._send_changes())

    async def _send_changes(self) -> None:
        with suppress(OSError):  # it is gone
            # What clients submit and give up would pile up before a worker that stands still.
            await self._writer.drain()
        changes = messages.Changes(self._take_submitted(), self._aborted)
        self._aborted, self._sending = [], None
        if self._submitted:
            self._send_changes_soon()
        self.num_submitted += len(changes.submitted)
        if changes.submitted or changes.aborted:
            self.send(changes)

    def _take_submitted(self) -> list[EngineRequest]:
        """Those of the next message."""
        taken: list[EngineRequest] = []
        length = 0
        while self._submitted and length < _MAX_LENGTH:
            request = self._submitted.pop(next(iter(self._submitted)))
            taken.append(request)
            length += len(request.prompt_ids) + len(request.output_ids) + len(request.params.grammar)
        return taken

    def kill(self) -> None:
        """Ends the process without a word, also one that is stopped, and the connection, whoever else holds it."""
        self.is_killed = True
        self._writer.transport.abort()
        with suppress(ProcessLookupError):  # it has ended by itself
            self._process.kill()

    async def stop(self) -> int:
        """Ends the process, kindly at first (it exits when its socket closes), and at once where this is cancelled.

        Returns its exit code.
        """
        self._writer.close()
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):  # wait_for may drop a cancellation, see Supervisor._watch
                return await self._process.wait()
        except TimeoutError:
            self.kill()
            return await self._process.wait()
        except asyncio.CancelledError:
            self.kill()
            raise


def _folder() -> str | None:
    """None for our own, or one that is there: torch cannot be imported in a folder that has been removed."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return "/"
    return None
