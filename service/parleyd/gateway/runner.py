"""Runs a prepared request: waits for its turn, has the worker generate its choices, yields their deltas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace

from parleyd.gateway.admission import Admission, Slots
from parleyd.gateway.answer import Answer, AnswerDelta
from parleyd.gateway.convert import Timings
from parleyd.gateway.fair_queue import Ticket
from parleyd.gateway.interleave import interleave
from parleyd.gateway.supervisor import Supervisor
from parleyd.gateway.worker_client import WorkerClient
from parleyd.generation import EngineRequest, SamplingParams
from parleyd.telemetry.call import current_call


@dataclass
class Generation:
    """A valid, tokenized request, and what becomes of it. `params` are those of its first choice.

    `resumed_ids` are output that the client has already; `ending` is all there is to say where they end the answer.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    answers: list[Answer]  # one for each choice
    priority: int
    deadline: float | None  # on the monotonic clock
    grammar_field: str  # which field of the request its grammar is made of
    interval: int  # see Streamer
    resumed_ids: tuple[int, ...] = ()
    ending: AnswerDelta | None = None
    queue_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    cached_prompt_tokens: int = 0
    timings: Timings | None = None  # once all choices have ended

    @property
    def num_prefilled(self) -> int:
        """The tokens to go through before the first that is new."""
        return len(self.prompt_ids) + len(self.resumed_ids)

    @property
    def completion_tokens(self) -> int:
        return sum(answer.num_tokens for answer in self.answers)


class Runner:
    """See `run`."""

    def __init__(
        self, admission: Admission, supervisor: Supervisor, worker: WorkerClient, *, knows_clients: bool
    ) -> None:
        """`knows_clients`: identities are proven, so each client gets prefixes from the cache that are its own."""
        self._admission = admission
        self._supervisor = supervisor
        self._worker = worker
        self._knows_clients = knows_clients

    @property
    def max_running(self) -> int:
        """How many sequences can generate at once."""
        return self._admission.max_running

    async def run(self, generation: Generation) -> AsyncGenerator[AnswerDelta]:
        """The deltas of all choices as they come; each choice's last one has a finish reason.

        The generation's timings are known with the very last. An error of one choice ends them all.
        """
        call = current_call.get()
        if generation.ending is not None:
            elapsed_s = call.elapsed()
            generation.timings = Timings(elapsed_s, elapsed_s, elapsed_s)
            yield generation.ending
            return
        num_open = len(generation.answers)
        slots = await self._admission.acquire(
            Ticket(
                client=call.identity,
                priority=generation.priority,
                num_sequences=num_open,
                num_tokens=generation.num_prefilled,
                deadline=generation.deadline,
            )
        )
        try:
            has_prompt = asyncio.Event()
            choices = [self._choose(generation, choice, slots, has_prompt) for choice in range(num_open)]
            async with aclosing(choices[0] if num_open == 1 else interleave(choices)) as deltas:
                async for delta in deltas:
                    num_open -= delta.finish_reason is not None
                    if not num_open:
                        generation.timings = Timings(
                            generation.queue_s, generation.first_token_s, generation.last_token_s
                        )
                    yield delta
        finally:
            slots.release()

    async def _choose(
        self, generation: Generation, choice: int, slots: Slots, has_prompt: asyncio.Event
    ) -> AsyncGenerator[AnswerDelta]:
        """One choice's deltas. All but the first wait for its first token: then they find the prompt in the cache."""
        call = current_call.get()
        if choice:
            await has_prompt.wait()
        await self._supervisor.wait_ready()
        generation.queue_s = generation.queue_s or call.elapsed()
        request = EngineRequest(
            key=self._worker.next_key(),
            prompt_ids=generation.prompt_ids,
            params=replace(generation.params, choice=choice),
            output_ids=generation.resumed_ids,
            priority=generation.priority,
            # Or usage and timings would tell one client what another has sent.
            cache_salt=call.identity if self._knows_clients else "",
        )
        # A slot is free again as soon as the worker is done: a reader that does not read holds up nobody.
        steps = self._worker.generate(request, slots.leave, generation.grammar_field, interval=generation.interval)
        async with aclosing(steps):
            async for step in steps:
                generation.last_token_s = max(generation.last_token_s, step.made_at - call.arrived)
                if not has_prompt.is_set():
                    has_prompt.set()
                    generation.first_token_s = generation.last_token_s
                    self._admission.first_token(generation.num_prefilled, generation.first_token_s - generation.queue_s)
                    generation.cached_prompt_tokens = step.cached_prompt_tokens
                delta = generation.answers[choice].push(step)
                delta.index = choice
                if delta.finish_reason is None:
                    yield delta
                    continue
                # Before the last delta leaves: a stop string may have ended the answer ahead of the worker.
                await steps.aclose()
                yield delta
                return
