"""The process that checks grammars, as the gateway holds it: started when first asked, and again after each that was
too much for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from parleyd.errors import EngineFault
from parleyd.gateway.worker_link import WorkerLink
from parleyd.generation import ModelInfo
from parleyd.ipc.messages import CheckGrammar, GrammarChecked

_logger = logging.getLogger("parleyd.grammar")

_TIMEOUT_S = 5.0
_START_TIMEOUT_S = 60.0  # it imports, and reads the tokenizer
_TOO_COMPLEX = GrammarChecked(error="is too complex: compiling it takes too much time or memory")


class CheckerProcess:
    """Answers one question at a time; it may crash, hang or grow without harm to us."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._link: WorkerLink | None = None

    async def check(self, question: CheckGrammar) -> GrammarChecked:
        """The verdict. Raises OSError or EngineFault where the process cannot be started."""
        if self._link is None:
            await self._start(question.info)
        answer = await self._ask(question, _TIMEOUT_S)
        if answer is None:
            _logger.warning("a %s of %d characters was too much", question.kind, len(question.source))
        return answer or _TOO_COMPLEX

    async def stop(self) -> None:
        """Ends it."""
        if self._link is not None:
            link, self._link = self._link, None
            link.kill()
            await link.stop()

    async def _start(self, info: ModelInfo) -> None:
        """A question of ours comes first: one of a client's must not have the time that a start may take."""
        self._link = await WorkerLink.start(self._command)
        if await self._ask(CheckGrammar(info, "regex", "a"), _START_TIMEOUT_S) is None:
            raise EngineFault("the process that checks grammars does not start")

    async def _ask(self, question: CheckGrammar, timeout_s: float) -> GrammarChecked | None:
        """None where the process did not answer in time, or died; another is started for the next question."""
        assert self._link is not None
        answer = None
        try:
            async with asyncio.timeout(timeout_s):
                self._link.send(question)
                answer = await self._link.receive()
        except TimeoutError:
            pass
        finally:
            if not isinstance(answer, GrammarChecked):  # also where we are cancelled: its answer would come later
                await self.stop()
        return answer if isinstance(answer, GrammarChecked) else None
