"""What the service is to reach, and what a suite's rows say about it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.summary import Row, ratio

CONCURRENCY = (1, 4, 16, 64)
# Two measurements of one and the same server differ by this much on an idle machine.
_NOISE = 0.03
_SUITE = "python -m benchmarks.suite --only"
_VLLM, _LLAMA_CPP = "vllm", "llama-cpp"


@dataclass(frozen=True)
class Target:
    """`measure` gives the figure, or None where the rows do not hold it."""

    what: str
    wanted: float
    at_least: bool
    unit: str
    step: str
    measure: Callable[[Sequence[Row]], float | None]

    @property
    def command(self) -> str:
        return f"{_SUITE} {self.step}"

    def is_met(self, value: float) -> bool:
        return value >= self.wanted if self.at_least else value <= self.wanted


def _cells(rows: Sequence[Row], server: str, concurrency: int) -> Iterator[Row]:
    """The closed loop's rows of a server, of all its configurations where a peer has several."""
    for row in rows:
        named = row.get("server", "") == server or (server == _VLLM and row.get("server", "").startswith(_VLLM))
        is_cell = row.get("workload") == "fixed" and row.get("concurrency") == concurrency
        if named and is_cell and row.get("tokens_per_s"):
            yield row


def _rate(server: str, concurrency: int) -> Callable[[Sequence[Row]], float | None]:
    return lambda rows: next((float(row["tokens_per_s"]) for row in _cells(rows, server, concurrency)), None)


def _ratio(ours: str, theirs: str, concurrency: int, key: str = "rounds") -> Callable[[Sequence[Row]], float | None]:
    """Against the peer's best configuration: round by round, then the median."""

    def measure(rows: Sequence[Row]) -> float | None:
        our_row = next(_cells(rows, ours, concurrency), None)
        ratios = [ratio(our_row[key], row[key]) for row in _cells(rows, theirs, concurrency)] if our_row else []
        if not ratios:
            return None
        return min(ratios) if key == "rounds" else max(ratios)

    return measure


def _experiment(name: str) -> Callable[[Sequence[Row]], float | None]:
    return lambda rows: next((float(row["value"]) for row in rows if row.get("experiment") == name), None)


def _never_below(rows: Sequence[Row]) -> float | None:
    ratios = [_ratio("parley", "parley-bf16", concurrency)(rows) for concurrency in CONCURRENCY]
    return min((value for value in ratios if value is not None), default=None)


def _step_growth(rows: Sequence[Row]) -> float | None:
    steps = [[row["itl_p50_ms"] for row in _cells(rows, "parley-bf16", concurrency)] for concurrency in (16, 64)]
    return statistics.mean(steps[1]) / statistics.mean(steps[0]) if all(steps) else None


TARGETS = (
    *(
        Target(
            f"tokens/s over vLLM's, same bf16 weights, c={c}",
            1.3 if c == 1 else 1.5,
            True,
            "x",
            "throughput",
            _ratio("parley-bf16", _VLLM, c),
        )
        for c in CONCURRENCY
    ),
    *(
        Target(
            f"TTFT p50 over vLLM's, c={c}",
            0.7,
            False,
            "x",
            "throughput",
            _ratio("parley-bf16", _VLLM, c, "ttft_p50_rounds_ms"),
        )
        for c in CONCURRENCY
    ),
    Target("tokens/s as shipped, c=1", 150, True, "tokens/s", "throughput", _rate("parley", 1)),
    Target("tokens/s as shipped over llama.cpp's, c=1", 1.0, True, "x", "throughput", _ratio("parley", _LLAMA_CPP, 1)),
    Target("tokens/s as shipped over vLLM's, c=4", 2.0, True, "x", "throughput", _ratio("parley", _VLLM, 4)),
    Target("tokens/s as shipped over ours in bf16, worst c", 1 - _NOISE, True, "x", "throughput", _never_below),
    Target("decode step at 64 streams over that at 16", 4.0, False, "x", "throughput", _step_growth),
    Target(
        "p95 inter-token latency over its p50 while prompts arrive",
        2.0,
        False,
        "x",
        "prompts-arriving",
        _experiment("prompts arriving"),
    ),
    Target("TTFT, shared prefix over cold", 0.2, False, "x", "shared-prefix", _experiment("shared prefix")),
    Target(
        "served over in-process tokens/s, c=64", 0.95, True, "x", "served-to-engine", _experiment("served to engine")
    ),
    Target("tokens/s with 10,000 waiting over none", 0.95, True, "x", "queue", _experiment("queue")),
    Target("start to serving, warm cache", 5.0, False, "s", "start", _experiment("start")),
    Target("memory of all processes, 16 streams", 1536, False, "MiB", "start", _experiment("memory")),
    Target("memory gained a request", 4.0, False, "KiB", "memory-growth", _experiment("memory growth")),
)
