"""Has the grammars of requests checked by processes of their own, and remembers the verdicts."""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import Sequence

from parleyd.errors import InvalidRequest, Unsupported, Violation
from parleyd.gateway.checker_process import TOO_COMPLEX, CheckerProcess
from parleyd.gateway.turns import Turns
from parleyd.gateway.verdict_cache import VerdictCache
from parleyd.ipc.messages import CheckGrammar, GrammarChecked, encode

CHECKER_COMMAND = (sys.executable, "-P", "-m", "parleyd.grammar")

# What takes too long may do so for the machine's sake, and a file may be readable later, so those verdicts are not kept
# for good; but a batch may ask often.
_DOUBTFUL_AFTER_S = 30.0
# Two, so that one client's grammars do not hold up all others'. The second is started when it is first needed.
_NUM_PROCESSES = 2


class GrammarChecker:
    """Clients take turns: one grammar of each is checked at a time. The latest verdicts are kept, whoever asked."""

    def __init__(self, command: Sequence[str] = CHECKER_COMMAND) -> None:
        self._processes = [CheckerProcess(command) for _ in range(_NUM_PROCESSES)]
        self._free: asyncio.LifoQueue[CheckerProcess] = asyncio.LifoQueue()  # the last used is warm
        for process in self._processes:
            self._free.put_nowait(process)
        self._turns = Turns()
        self._asking: set[asyncio.Task[GrammarChecked]] = set()
        self._verdicts = VerdictCache()

    async def check(self, question: CheckGrammar, client: str = "") -> str:
        """The grammar for the engine. Raises InvalidRequest, Unsupported, or EngineFault where no process starts."""
        verdict = await self._verdict(hashlib.sha256(encode(question)).digest(), question, client)
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
        """Ends the processes."""
        for task in self._asking:
            task.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)
        for process in self._processes:
            await process.stop()

    async def _verdict(self, key: bytes, question: CheckGrammar, client: str) -> GrammarChecked:
        if (known := self._verdicts.get(key)) is not None:
            return known
        await self._turns.take(client)
        if (known := self._verdicts.get(key)) is not None:  # the client's check before this one was the same
            self._turns.pass_on(client)
            return known
        task = asyncio.create_task(self._ask(key, question))
        self._asking.add(task)
        task.add_done_callback(lambda task: self._end(client, task))
        # What has begun goes on without its caller: who cancels and asks again has one turn all the same.
        return await asyncio.shield(task)

    async def _ask(self, key: bytes, question: CheckGrammar) -> GrammarChecked:
        process = await self._free.get()
        try:
            verdict = await process.check(question)
        finally:
            self._free.put_nowait(process)
        self._verdicts.put(key, verdict)
        if verdict is TOO_COMPLEX or verdict.unsupported:
            asyncio.get_running_loop().call_later(_DOUBTFUL_AFTER_S, self._verdicts.drop, key)
        return verdict

    def _end(self, client: str, task: asyncio.Task[GrammarChecked]) -> None:
        self._asking.discard(task)
        self._turns.pass_on(client)
        if not task.cancelled():
            task.exception()  # where its caller is gone nobody else asks for it, and asyncio would complain
