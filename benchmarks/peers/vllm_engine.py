"""vLLM's engine without its server, in this process. Runs in the environment of the peer `vllm`; prints JSON."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
from dataclasses import dataclass

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # else the engine's core is a process of its own

from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

from benchmarks import workload
from benchmarks.load import Output, Run, drive

_MAX_CONTEXT_TOKENS = 4096
_MAX_RUNNING = 64


@dataclass
class Request:
    """One conversation, tokenized."""

    key: int
    prompt_ids: list[int]
    new_tokens: int


class VllmEngine:
    """As parleyd's engines: `submit` and `step`."""

    def __init__(self, model: str) -> None:
        llm = LLM(model, dtype="bfloat16", max_model_len=_MAX_CONTEXT_TOKENS, max_num_seqs=_MAX_RUNNING)
        self._engine = llm.llm_engine
        self._tokenizer = llm.get_tokenizer()
        self._keys = itertools.count()

    def run(self, seed: int, concurrency: int, number: int, new_tokens: int) -> Run:
        """A closed loop of the fixed workload, as offline.py's."""
        asked = workload.fixed(seed, number, new_tokens)
        return drive(self, [self._request(request) for request in asked], new_tokens, concurrency)

    def submit(self, request: Request) -> None:
        params = SamplingParams(
            temperature=0.0, max_tokens=request.new_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        self._engine.add_request(str(request.key), {"prompt_token_ids": request.prompt_ids}, params)

    def step(self) -> list[Output]:
        """One token of each running sequence."""
        return [
            Output(int(output.request_id), list(output.outputs[0].token_ids), output.finished)
            for output in self._engine.step()
        ]

    def _request(self, request: workload.Request) -> Request:
        messages = [{"role": role, "content": content} for role, content in request.messages]
        encoded = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return Request(next(self._keys), list(encoded["input_ids"]), request.new_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a folder")
    parser.add_argument(
        "--offline", type=int, nargs=3, required=True, metavar=("CONCURRENCY", "REQUESTS", "NEW_TOKENS")
    )
    arguments = parser.parse_args()
    concurrency, number, new_tokens = arguments.offline
    engine = VllmEngine(arguments.model)
    engine.run(1, concurrency, concurrency, new_tokens)
    print(json.dumps(dataclasses.asdict(engine.run(0, concurrency, number, new_tokens))))


if __name__ == "__main__":
    main()
