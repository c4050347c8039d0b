"""The process that checks grammars, as the gateway holds it: started when first asked, and again whenever it has died
or been ended. A question is blamed for a death only where the process was asked nothing else."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress

from parleyd.errors import EngineFault
from parleyd.gateway.worker_link import WorkerLink
from parleyd.generation import ModelInfo
from parleyd.ipc.messages import CheckGrammar, GrammarChecked

_logger = logging.getLogger("parleyd.grammar")

_TIMEOUT_S = 5.0
_START_TIMEOUT_S = 60.0  # it imports, and reads the tokenizer
_NUM_STEPS = 10
TOO_COMPLEX = GrammarChecked(error="is too complex: compiling it takes too much time or memory")


class CheckerProcess:
    """Answers one question at a time; it may crash, hang or grow without harm to us."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._link: WorkerLink | None = None

    async def check(self, question: CheckGrammar) -> GrammarChecked:
        """The verdict; TOO_COMPLEX where the question takes more than 5 s, or a process of its own dies of it.

        Raises EngineFault where the process cannot be started.
        """
        try:
            verdict = await self._ask(question, _TIMEOUT_S) if self._link is not None else None
            if verdict is None:  # it had died before, or of what earlier questions have left in its memory
                await self._start(question.info)
                verdict = await self._ask(question, _TIMEOUT_S)
        except TimeoutError:
            verdict = None
        if verdict is None:
            _logger.warning("a %s of %d characters was too much", question.kind, len(question.source))
        return verdict or TOO_COMPLEX

    async def stop(self) -> None:
        """Ends it."""
        if self._link is not None:
            link, self._link = self._link, None
            link.kill()
            await link.stop()

    async def _start(self, info: ModelInfo) -> None:
        """A question of ours comes first: one of a client's must not have the time that a start may take."""
        try:
            self._link = await WorkerLink.start(self._command)
        except (OSError, RuntimeError) as error:  # no file can be opened, no thread begun
            raise EngineFault(f"the process that checks grammars cannot be started: {error}") from error
        with suppress(TimeoutError):
            if await self._ask(CheckGrammar(info, "regex", "a"), _START_TIMEOUT_S) is not None:
                return
        raise EngineFault("the process that checks grammars does not start")

    async def _ask(self, question: CheckGrammar, timeout_s: float) -> GrammarChecked | None:
        """None where the process died. Raises TimeoutError where it takes longer. After either it is ended."""
        assert self._link is not None
        self._link.send(question)
        receiving = asyncio.create_task(self._link.receive())
        answer = None
        try:
            # In steps: a time in which we were stopped ourselves, alone or with the whole machine, counts as one.
            for _ in range(_NUM_STEPS):
                await asyncio.wait([receiving], timeout=timeout_s / _NUM_STEPS)
                if receiving.done():
                    break
            else:
                raise TimeoutError
            if isinstance(received := receiving.result(), GrammarChecked):
                answer = received
            return answer
        finally:
            if answer is None:  # also where we are cancelled: its answer would come later
                receiving.cancel()
                await self.stop()
