"""A worker process without torch or weights: the real process and IPC, an engine that answers by script.

It answers with the last message of the conversation, or with what stands in the prompt's last «», a byte a token, then
the end token. Some messages are orders:
`!forever` never ends, `!die` kills the process, `!die-at 3 text` kills it once, after 3 ids of its answer, `!hang-at`
stops it there instead, `!break-at` makes `step` raise there, `!die-after 1 text` kills each worker that has made one id
of it, `!garble` makes the worker send nonsense once, `!fail` makes the engine fail for the request after one id,
`!fail 2` for its choice 2, `!fail-first` before any, `!misfit` says that its grammar cannot be followed, `!choice`
answers with the choice's number, `!ids 240 159` with these ids, `!wait` gives no token until it is aborted,
`!touch PATH` makes the file in the step that gives its first.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from parleyd.config import ModelSettings
from parleyd.engine.engine import Engine
from parleyd.errors import StartupError
from parleyd.generation import (
    EngineRequest,
    EngineStats,
    FinishReason,
    ModelInfo,
    Output,
    SamplingDefaults,
    SamplingParams,
    TokenLogprob,
)
from parleyd.worker.process import run
from tests.support import tiny_tokenizer

MAX_CONTEXT_TOKENS = 4096


class BrokenEngineError(Exception):
    """What no step can follow."""


class MisfitError(Exception):
    """A grammar that cannot be followed any further."""


class ScriptedEngine:
    """One step gives each running request its next id."""

    def __init__(self, step_delay_s: float) -> None:
        self.progress = 0
        self._num_generated = 0
        self._step_delay_s = step_delay_s
        self._changed = threading.Condition()
        self._has_news = False
        self._running: dict[int, tuple[EngineRequest, Iterator[int]]] = {}
        self._counts: dict[int, int] = {}

    def submit(self, request: EngineRequest) -> None:
        with self._changed:
            self._running[request.key] = (request, itertools.islice(script(request), len(request.output_ids), None))
            self._counts[request.key] = len(request.output_ids)
            self._has_news = True
            self._changed.notify()

    def abort(self, key: int) -> None:
        with self._changed:
            self._running.pop(key, None)

    def stats(self) -> EngineStats:
        num_running = len(self._running)
        return EngineStats(
            num_running=num_running,
            num_blocks=MAX_CONTEXT_TOKENS,
            num_used_blocks=num_running,
            num_generated_tokens=self._num_generated,
        )

    def step(self) -> list[Output]:
        outputs: list[Output] = []
        while not outputs:
            with self._changed:
                self._changed.wait_for(lambda: self._running or self._has_news)
                self._has_news = False
                self.progress += 1
                outputs = [output for key in list(self._running) if (output := self._advance(key))]
            time.sleep(self._step_delay_s)
        return outputs

    def _advance(self, key: int) -> Output | None:
        request, ids = self._running[key]
        try:
            token_id = next(ids)
        except RuntimeError as error:
            del self._running[key]
            return Output(key=key, error=str(error))
        except MisfitError as error:
            del self._running[key]
            return Output(key=key, grammar_error=str(error))
        if token_id is None:
            return None
        self._counts[key] += 1
        self._num_generated += 1
        reason = None
        stop_ids = {*request.params.stop_token_ids} | (
            {*()} if request.params.ignore_eos else {tiny_tokenizer.IM_END_ID}
        )
        if token_id in stop_ids:
            reason = FinishReason.STOP
        elif self._counts[key] >= min(request.params.max_new_tokens, MAX_CONTEXT_TOKENS - len(request.prompt_ids)):
            reason = FinishReason.LENGTH
        if reason:
            del self._running[key]
        logprobs = (logprob(token_id, request.params),) if request.params.logprobs else ()
        return Output(key=key, token_ids=(token_id,), logprobs=logprobs, finish_reason=reason)


def logprob(token_id: int, params: SamplingParams) -> TokenLogprob:
    """Made up, but exact in float32, and telling of the id; the id itself is the likeliest."""
    top = [(token_id, -token_id / 64), *((other, -float(other + 8)) for other in range(20) if other != token_id)]
    return TokenLogprob(-token_id / 64, tuple(top[: params.top_logprobs]))


def script(request: EngineRequest) -> Iterator[int]:
    """The ids that answer a request."""
    words = last_message(request).split(" ")
    match words[0]:
        case "!forever":
            yield from itertools.cycle(b"all work and no play ")
        case "!wait":
            yield from itertools.repeat(None)
        case "!die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "!die-at" | "!hang-at" | "!break-at":
            for position, token_id in enumerate(" ".join(words[2:]).encode()):
                if position == int(words[1]) and len(request.output_ids) < position:
                    _go_wrong(words[0])
                yield token_id
        case "!die-after":
            for num_made, token_id in enumerate(" ".join(words[2:]).encode()):
                if num_made == len(request.output_ids) + int(words[1]):
                    os.kill(os.getpid(), signal.SIGKILL)
                yield token_id
        case "!garble":
            yield ord("x")
            if not request.output_ids:
                os.write(int(sys.argv[-1]), b"\0\0\0\1\xc1")  # a whole frame; no MessagePack begins so
            yield ord("y")
        case "!choice":
            yield from f"choice {request.params.choice}".encode()
        case "!fail" if words[1:] in ([], [str(request.params.choice)]):
            raise_after_first_id = RuntimeError("scripted failure")
            yield ord("x")
            raise raise_after_first_id
        case "!fail-first":
            raise RuntimeError("scripted failure")
        case "!misfit":
            raise MisfitError("scripted misfit")
        case "!touch":
            Path(words[1]).touch()
            yield ord("x")
        case "!ids":
            yield from map(int, filter(None, words[1:]))
        case _:
            yield from " ".join(words).encode()
    while True:
        yield tiny_tokenizer.IM_END_ID


def _go_wrong(order: str) -> None:
    if order == "!break-at":
        raise BrokenEngineError
    os.kill(os.getpid(), signal.SIGKILL if order == "!die-at" else signal.SIGSTOP)


def last_message(request: EngineRequest) -> str:
    """The content of the conversation's last message, from the prompt's ids."""
    ids = list(request.prompt_ids)
    *_, quoted = ("", *bytes(i for i in ids if i < tiny_tokenizer.NUM_BYTES).decode(errors="replace").split("«")[1:])
    if quoted:
        return quoted.partition("»")[0]
    assistant = list(b"assistant\n")
    if ids[-len(assistant) :] == assistant:  # the generation prompt; else the message is to be continued
        ids = ids[: -len(assistant) - 1]
    start = len(ids) - 1 - ids[::-1].index(tiny_tokenizer.IM_START_ID)
    text = bytes(i for i in ids[start + 1 :] if i < tiny_tokenizer.NUM_BYTES).decode(errors="replace")
    return text.split("\n", 1)[1].removesuffix("\n")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--step-delay", type=float, default=0.0)
    parser.add_argument("--load-delay", type=float, default=0.0)
    parser.add_argument("--load-error")
    parser.add_argument("--die-if", type=Path, help="dies instead of loading if this file is there")
    parser.add_argument("--hang-if", type=Path, help="stops instead of loading if this file is there")
    parser.add_argument("--hold-if", type=Path, help="loads nothing for as long as this file is there")
    parser.add_argument("--stop-string", action="append", default=[])
    parser.add_argument("--num-return-sequences", type=int)
    parser.add_argument("--do-sample", action="store_true", default=None)
    parser.add_argument("--max-running", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=tiny_tokenizer.VOCAB_SIZE)
    parser.add_argument("fd", type=int)
    arguments = parser.parse_args()

    def load(settings: ModelSettings) -> tuple[Engine, ModelInfo]:
        time.sleep(arguments.load_delay)
        if arguments.die_if and arguments.die_if.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if arguments.hang_if and arguments.hang_if.exists():
            arguments.hang_if.unlink()
            os.kill(os.getpid(), signal.SIGSTOP)
        while arguments.hold_if and arguments.hold_if.exists():
            time.sleep(0.005)
        if arguments.load_error:
            raise StartupError(arguments.load_error)
        info = ModelInfo(
            tokenizer_dir=str(arguments.folder),
            max_context_tokens=MAX_CONTEXT_TOKENS,
            vocab_size=arguments.vocab_size,
            eos_token_ids=(tiny_tokenizer.IM_END_ID,),
            dtype="float32",
            device="cpu",
            engine="scripted",
            max_running=arguments.max_running,
            defaults=SamplingDefaults(
                do_sample=arguments.do_sample,
                temperature=0.5,
                stop_strings=tuple(arguments.stop_string),
                num_return_sequences=arguments.num_return_sequences,
            ),
        )
        return ScriptedEngine(arguments.step_delay), info

    return run(arguments.fd, load)


if __name__ == "__main__":
    os._exit(main())
