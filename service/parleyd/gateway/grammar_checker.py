"""Has the grammars of requests checked by the checker process, which may crash, hang or grow without harm to us."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import sys
from collections import OrderedDict
from collections.abc import Sequence

from parleyd.errors import InvalidRequest, Unsupported, Violation
from parleyd.gateway.worker_link import WorkerLink
from parleyd.ipc.messages import CheckGrammar, GrammarChecked, encode

_logger = logging.getLogger("parleyd.grammar")

CHECKER_COMMAND = (sys.executable, "-P", "-m", "parleyd.grammar")

_MAX_CACHED = 256
_TIMEOUT_S = 5.0
_FIRST_TIMEOUT_S = 60.0  # it also imports, and reads the tokenizer
_TOO_COMPLEX = GrammarChecked(error="is too complex: compiling it takes too much time or memory")


class GrammarChecker:
    """Keeps one process, started when it is first needed, and its latest verdicts. Equal checks are made once."""

    def __init__(self, command: Sequence[str] = CHECKER_COMMAND) -> None:
        self._command = command
        self._link: WorkerLink | None = None
        self._is_warm = False
        self._turn = asyncio.Lock()
        self._verdicts: OrderedDict[bytes, asyncio.Task[GrammarChecked]] = OrderedDict()

    async def check(self, question: CheckGrammar) -> str:
        """The grammar for the engine. Raises InvalidRequest or Unsupported."""
        key = hashlib.sha256(encode(question)).digest()
        task = self._verdicts.pop(key, None)
        if task is None:
            task = asyncio.create_task(self._ask(question))
        self._verdicts[key] = task
        if len(self._verdicts) > _MAX_CACHED:
            self._verdicts.popitem(last=False)
        try:
            # Whoever else waits for the same verdict is to get it, though this call is cancelled.
            verdict = await asyncio.shield(task)
        except OSError:
            self._verdicts.pop(key, None)
            raise
        is_of_tools = question.kind == "tool_calls"
        if verdict.unsupported:
            field = "tool_choice" if is_of_tools else "response_format"
            raise Unsupported(field, f"this model's tokenizer does not allow it: {verdict.unsupported}")
        if verdict.error:
            field = "tools" if is_of_tools else f"response_format.{question.kind}"
            errors = verdict.errors or {field: verdict.error}
            raise InvalidRequest([Violation(path, error) for path, error in errors.items()])
        if verdict.breaks_off:
            allowing = "tool_choice" if is_of_tools else "response_format"
            raise InvalidRequest([Violation("resume.token_ids", f"are not what {allowing} allows")])
        return verdict.grammar

    async def close(self) -> None:
        """Ends the process."""
        for task in self._verdicts.values():
            task.cancel()
        if self._link is not None:
            await self._link.stop()

    async def _ask(self, question: CheckGrammar) -> GrammarChecked:
        async with self._turn:
            if self._link is None:
                self._link, self._is_warm = await WorkerLink.start(self._command), False
            self._link.send(question)
            answer = None
            try:
                async with asyncio.timeout(_TIMEOUT_S if self._is_warm else _FIRST_TIMEOUT_S):
                    answer = await self._link.receive()
            except TimeoutError:
                pass
            if isinstance(answer, GrammarChecked):
                self._is_warm = True
                return answer
            _logger.warning("a %s of %d characters was too much", question.kind, len(question.source))
            link, self._link = self._link, None
            link.kill()
            await link.stop()
            return _TOO_COMPLEX
