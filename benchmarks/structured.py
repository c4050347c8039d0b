"""What a grammar costs: compiling typical ones, and the steps of 16 streams with one each against 16 without.

`python -m benchmarks.structured`: in process, engine `batching`, the embedded model; rounds of both in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import describe
from parleyd.config import ModelSettings
from parleyd.engine.engine import Engine
from parleyd.generation import EngineRequest, SamplingParams
from parleyd.grammar.compiler import compile_grammar, load_tokenizer
from parleyd.grammar.formats import to_grammar
from parleyd.worker.load import load

_NUM_STREAMS, _NUM_TOKENS = 16, 24
_PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
}
_SCHEMAS: dict[str, dict[str, Any]] = {
    "any object": {"type": "object"},
    "a person": _PERSON,
    "100 members": {
        "type": "object",
        "properties": {f"member{i}": {"type": "array", "items": _PERSON} for i in range(100)},
    },
    "enum of 1,000": {"enum": [f"value number {i}" for i in range(1000)]},
}
# Long enough for every answer to be cut off.
_PEOPLE = {"type": "array", "items": _PERSON, "minItems": 1000}


def compile_times_ms(info: Any) -> dict[str, float]:
    """The median of five, each from the schema's text to a matcher."""
    tokenizer = load_tokenizer(info.tokenizer_dir, info.vocab_size, info.eos_token_ids)
    times = {}
    for name, schema in _SCHEMAS.items():
        rounds = []
        for _ in range(5):
            started = time.perf_counter()
            compile_grammar(tokenizer, to_grammar("json_schema", json.dumps(schema)))
            rounds.append(1e3 * (time.perf_counter() - started))
        times[name] = round(statistics.median(rounds), 2)
    return times


def step_ms(engine: Engine, first_key: int, grammar: str) -> float:
    """The median step of 16 streams that all decode."""
    params = SamplingParams(
        max_new_tokens=_NUM_TOKENS, ignore_eos=True, do_sample=True, temperature=0.8, grammar=grammar
    )
    for key in range(first_key, first_key + _NUM_STREAMS):
        engine.submit(EngineRequest(key=key, prompt_ids=tuple(range(100, 140)), params=params))
    times, num_open = [], _NUM_STREAMS
    while num_open:
        started = time.perf_counter()
        outputs = engine.step()
        elapsed = time.perf_counter() - started
        num_open -= sum(output.is_last for output in outputs)
        if len(outputs) == _NUM_STREAMS:
            times.append(1e3 * elapsed)
    return statistics.median(times)


def main() -> None:
    """Prints the result, and writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    engine, info = load(ModelSettings())
    grammar = to_grammar("json_schema", json.dumps(_PEOPLE))
    free, steered = [], []
    for key in range(0, 2 * arguments.rounds * _NUM_STREAMS, 2 * _NUM_STREAMS):
        free.append(step_ms(engine, key, ""))
        steered.append(step_ms(engine, key + _NUM_STREAMS, grammar))
    result = {
        "environment": describe(),
        "compile_ms": compile_times_ms(info),
        "step_ms_free": round(statistics.median(free), 2),
        "step_ms_with_grammars": round(statistics.median(steered), 2),
        "share_of_step": round(statistics.median(b / a for a, b in zip(free, steered, strict=True)) - 1, 3),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
