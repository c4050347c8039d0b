"""From runs to figures: percentiles over all their tokens, medians over rounds, ratios round by round.

Noise on a shared machine is large and slow, so servers are measured in turns and only ratios within a turn count.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.load import Run

_CURVE = [*range(0, 100, 5), 99, 100]

Row = dict[str, Any]


def summarise(labels: Row, runs: Sequence[Run], bytes_per_step: float | None = None, gb_limit: float = 0.0) -> Row:
    """One row of a result file. `bytes_per_step`: the weights that a decode step reads, `gb_limit` the machine's GB/s.

    A step serves all streams at once, so the bandwidth used is that of tokens/s by the concurrency.
    """
    tokens_per_s = [run.tokens_per_s for run in runs]
    first_tokens_s = [_first_tokens_s(run) for run in runs]
    row = {
        **labels,
        "tokens_per_s": round(statistics.median(tokens_per_s), 1),
        "rounds": [round(value, 2) for value in tokens_per_s],
        "num_answers": sum(run.num_answers for run in runs),
        **_times("ttft", [value for first_tokens in first_tokens_s for value in first_tokens]),
        **_times("itl", [value for run in runs for value in run.between_tokens_s]),
        "ttft_p50_rounds_ms": [_milliseconds(first_tokens, 50) for first_tokens in first_tokens_s],
    }
    if bytes_per_step and gb_limit:
        gb_per_s = bytes_per_step * row["tokens_per_s"] / labels["concurrency"] / 1e9
        row["gb_per_s"] = round(gb_per_s, 1)
        row["share_of_bandwidth"] = round(gb_per_s / gb_limit, 3)
    if any(run.is_cut for run in runs):
        row["is_cut"] = True
    if num_refused := sum(len(run.refused_s) for run in runs):
        row["num_refused"] = num_refused
    if errors := [error for run in runs for error in run.errors]:
        row["num_errors"], row["first_error"] = len(errors), errors[0]
    return row


def _first_tokens_s(run: Run) -> list[float]:
    """Those that were cut off too, if they had waited longer than half of the others: theirs would have been later yet.

    Without them, a server that lets most wait until the end would be judged by the few that it began with.
    """
    median = percentile(run.first_token_s, 50) if run.first_token_s else 0.0
    return run.first_token_s + [seconds for seconds in run.cut_first_token_s if seconds > median]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios of what was measured in the same turn."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=False) if b)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))]


def line(row: Row) -> str:
    """One line for the terminal."""
    hidden = {"rounds", "ttft_curve_ms", "itl_curve_ms", "ttft_p50_rounds_ms", "num_answers"}
    return "  ".join(f"{key}={value}" for key, value in row.items() if key not in hidden)


def _times(name: str, values: list[float]) -> Row:
    if not values:
        return {}
    return {
        **{f"{name}_p{percent}_ms": _milliseconds(values, percent) for percent in (50, 95, 99)},
        f"{name}_curve_ms": [[percent, _milliseconds(values, percent)] for percent in _CURVE],
    }


def _milliseconds(values: Sequence[float], percent: float) -> float:
    return round(1000 * percentile(values, percent), 2) if values else 0.0
