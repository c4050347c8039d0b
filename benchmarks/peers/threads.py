"""What a first version of every such service does: a thread for each request, with its own `generate` and streamer.

Runs in the environment of the peer `transformers`.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Generator
from itertools import islice
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteriaList, TextIteratorStreamer

from benchmarks.peers import front


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder in the layout of transformers")
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(arguments.model)

    def stream(messages: front.Messages, new_tokens: int) -> Generator[str]:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        streamer: Any = TextIteratorStreamer(tokenizer, skip_prompt=True)
        is_gone = threading.Event()
        stop = StoppingCriteriaList([lambda ids, _: torch.full((len(ids),), is_gone.is_set())])
        options = {"streamer": streamer, "stopping_criteria": stop, "max_new_tokens": new_tokens, "do_sample": False}
        threading.Thread(target=model.generate, kwargs={**inputs, **options}, daemon=True).start()
        try:
            yield from islice(streamer, new_tokens)  # a piece a token, and one more at the end
        finally:
            is_gone.set()

    front.serve(arguments.port, stream)


if __name__ == "__main__":
    main()
