"""llama.cpp's own engine: its batch API, driven as a server drives it, with as little around it as can be.

Runs in the environment of the peer `llama-cpp`. `--port` serves it over HTTP; `--offline` measures it in process and
prints the result as JSON; `--to-bf16` writes the same model in bfloat16.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import heapq
import itertools
import json
import os
import queue
import threading
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass

import llama_cpp
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from benchmarks import workload
from benchmarks.load import Output, drive
from benchmarks.peers import front

_MAX_RUNNING = 64
_BATCH_TOKENS = 512
_SLOT_TOKENS = 2048


@dataclass
class Request:
    """One conversation, tokenized, and what is done of it."""

    key: int
    prompt_ids: list[int]
    new_tokens: int
    slot: int = -1
    num_prefilled: int = 0
    output_ids: list[int] = dataclasses.field(default_factory=list)
    is_given_up: bool = False  # set by whoever asked


class LlamaEngine:
    """Continuous batching: a step decodes one token of each running sequence beside a stretch of the next prompts."""

    def __init__(self, path: str) -> None:
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        # Its kernels for a matrix unit (AMX) end the process by SIGILL; others of this kind know neither Q4_1 nor bf16.
        model_params.use_extra_bufts = False
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = _MAX_RUNNING * _SLOT_TOKENS, _BATCH_TOKENS, _BATCH_TOKENS
        # Else only sequences of adjacent slots share a pass over the weights.
        params.n_seq_max, params.kv_unified = _MAX_RUNNING, True
        params.n_threads = params.n_threads_batch = os.cpu_count() or 1
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(_BATCH_TOKENS, 0, 1)
        self._inbox: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._free_slots = list(range(_MAX_RUNNING))

    def submit(self, request: Request) -> None:
        self._inbox.put(request)

    def step(self) -> list[Output]:
        """Waits until there is something to do."""
        while not self._inbox.empty() or not (self._running or self._waiting):
            self._waiting.append(self._inbox.get())
        for request in [request for request in self._running if request.is_given_up]:
            self._end(request)
        while self._waiting and self._free_slots:
            request = self._waiting.popleft()
            if not request.is_given_up:
                request.slot = heapq.heappop(self._free_slots)
                self._running.append(request)
        if not self._running:
            return []
        sampling = self._fill()
        if status := llama_cpp.llama_decode(self._context, self._batch):
            raise RuntimeError(f"llama_decode: {status}")
        return [self._sample(row, request) for row, request in sampling]

    def _fill(self) -> list[tuple[int, Request]]:
        """The batch; which of its rows give a token, and whose."""
        self._batch.n_tokens = 0
        sampling = []
        for request in sorted(self._running, key=lambda request: (not request.output_ids, request.slot)):
            if request.output_ids:
                ids, position = request.output_ids[-1:], len(request.prompt_ids) + len(request.output_ids) - 1
            else:
                room = _BATCH_TOKENS - self._batch.n_tokens
                position = request.num_prefilled
                ids = request.prompt_ids[position : position + room]
                request.num_prefilled += len(ids)
            for offset, token_id in enumerate(ids):
                self._add(token_id, position + offset, request.slot)
            if ids and (request.output_ids or request.num_prefilled == len(request.prompt_ids)):
                self._batch.logits[self._batch.n_tokens - 1] = 1
                sampling.append((self._batch.n_tokens - 1, request))
        return sampling

    def _add(self, token_id: int, position: int, slot: int) -> None:
        row = self._batch.n_tokens
        self._batch.token[row], self._batch.pos[row], self._batch.logits[row] = token_id, position, 0
        self._batch.n_seq_id[row], self._batch.seq_id[row][0] = 1, slot
        self._batch.n_tokens += 1

    def _sample(self, row: int, request: Request) -> Output:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        token_id = int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())
        request.output_ids.append(token_id)
        is_last = len(request.output_ids) == request.new_tokens
        if is_last:
            self._end(request)
        return Output(request.key, [token_id], is_last)

    def _end(self, request: Request) -> None:
        self._running.remove(request)
        heapq.heappush(self._free_slots, request.slot)
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), request.slot, -1, -1)


class Tokenizer:
    """Conversations to ids, with the model's own chat template."""

    def __init__(self, path: str) -> None:
        self._llama = llama_cpp.Llama(path, vocab_only=True, verbose=False)
        eos, bos = (self._llama.detokenize([id], special=True).decode() for id in (self._llama.token_eos(), 1))
        self._template = Jinja2ChatFormatter(self._llama.metadata["tokenizer.chat_template"], eos, bos)

    def encode(self, messages: front.Messages) -> list[int]:
        prompt = self._template(messages=messages).prompt
        return list(self._llama.tokenize(prompt.encode(), add_bos=False, special=True))

    def decode(self, token_id: int) -> str:
        return str(self._llama.detokenize([token_id], special=True).decode(errors="replace"))


def serve(engine: LlamaEngine, tokenizer: Tokenizer, port: int) -> None:
    """Serves for ever."""
    answers: dict[int, queue.SimpleQueue[Output]] = {}
    keys = itertools.count()

    def run() -> None:
        while True:
            for output in engine.step():
                if (answer := answers.get(output.key)) is not None:
                    answer.put(output)

    def stream(messages: front.Messages, new_tokens: int) -> Generator[str]:
        request = Request(next(keys), tokenizer.encode(messages), new_tokens)
        answer: queue.SimpleQueue[Output] = queue.SimpleQueue()
        answers[request.key] = answer
        engine.submit(request)
        try:
            for _ in range(new_tokens):
                yield tokenizer.decode(answer.get().token_ids[0])
        finally:
            request.is_given_up = True
            del answers[request.key]

    threading.Thread(target=run, daemon=True).start()
    front.serve(port, stream)


def measure(engine: LlamaEngine, tokenizer: Tokenizer, concurrency: int, num_requests: int, new_tokens: int) -> str:
    """A closed loop of the fixed workload, as offline.py's."""
    keys = itertools.count()

    def requests(seed: int, number: int) -> list[Request]:
        asked = workload.fixed(seed, number, new_tokens)
        messages = ([{"role": role, "content": content} for role, content in one.messages] for one in asked)
        return [Request(next(keys), tokenizer.encode(one), new_tokens) for one in messages]

    drive(engine, requests(1, concurrency), new_tokens, concurrency)
    return json.dumps(dataclasses.asdict(drive(engine, requests(0, num_requests), new_tokens, concurrency)))


def to_bf16(source: str, target: str) -> None:
    """Writes the same weights in bfloat16."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_BF16, True
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        raise RuntimeError(f"{source} cannot be written in bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a .gguf file")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--port", type=int)
    action.add_argument("--offline", type=int, nargs=3, metavar=("CONCURRENCY", "REQUESTS", "NEW_TOKENS"))
    action.add_argument("--to-bf16", metavar="FILE")
    arguments = parser.parse_args()
    if arguments.to_bf16:
        return to_bf16(arguments.model, arguments.to_bf16)
    engine, tokenizer = LlamaEngine(arguments.model), Tokenizer(arguments.model)
    if arguments.offline:
        return print(measure(engine, tokenizer, *arguments.offline))
    return serve(engine, tokenizer, arguments.port)


if __name__ == "__main__":
    main()
