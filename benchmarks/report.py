"""A suite's result file as Markdown with plots: the targets, every figure, where it was measured.

`python -m benchmarks.report FILE.json` writes FILE.md and FILE-*.png beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.summary import Row
from benchmarks.targets import TARGETS

_LATENCIES = {"ttft": "time to first token", "itl": "inter-token latency"}
_COLUMNS = {
    "server": "server",
    "loop": "loop",
    "concurrency": "streams",
    "tokens_per_s": "tokens/s",
    "gb_per_s": "GB/s",
    "share_of_bandwidth": "of the limit",
    "ttft_p50_ms": "TTFT p50",
    "ttft_p95_ms": "p95",
    "ttft_p99_ms": "p99 (ms)",
    "itl_p50_ms": "ITL p50",
    "itl_p95_ms": "p95",
    "itl_p99_ms": "p99 (ms)",
    "ratio_of_first": "ours / it",
    "is_cut": "cut off",
    "num_errors": "errors",
}


def write(result: Path) -> str:
    """Writes the report beside the result file. Returns the table of targets, for the terminal."""
    content = json.loads(result.read_text())
    rows: list[Row] = content["rows"]
    targets = targets_table(rows)
    plots = _plot(result, [row for row in rows if row.get("workload") == "fixed"])
    parts = [
        f"# Benchmark: {result.stem}",
        *(["**A smoke run: it shows that the programs work; its figures mean nothing.**"] * (result.stem == "smoke")),
        "\n".join(f"- {key}: {value}" for key, value in content["environment"].items()),
        "## Targets",
        targets,
        "## Throughput and latency",
        "Greedy; prompts of 60 to 70 tokens (fixed) or of many lengths (mixed). In a closed loop each stream asks "
        "again as soon as it is answered; in an open one requests arrive at random, whether or not earlier ones are "
        "answered, and only the warm-up has so many streams. Our server is the first in each group.",
        *(throughput_table(rows, workload) for workload in ("fixed", "mixed")),
        *(f"![{plot.stem}]({plot.name})" for plot in plots),
        "## Everything else",
        *(f"- `{json.dumps(row)}`" for row in rows if "workload" not in row and "itl_curve_ms" not in row),
    ]
    result.with_suffix(".md").write_text("\n\n".join(part for part in parts if part) + "\n")
    return f"{targets}\n\n{result.with_suffix('.md')}"


def targets_table(rows: Sequence[Row]) -> str:
    """Each target, what was measured, whether it is met, and the command that measures it."""
    lines = ["| target | wanted | measured | | command |", "|---|---|---|---|---|"]
    for target in TARGETS:
        value = target.measure(rows)
        sign = "≥" if target.at_least else "≤"
        verdict = "–" if value is None else "met" if target.is_met(value) else "**MISSED**"
        measured = "not measured" if value is None else f"{value:.4g} {target.unit}"
        lines.append(
            f"| {target.what} | {sign} {target.wanted:g} {target.unit} | {measured} | {verdict} | `{target.command}` |"
        )
    failed = [f"- {row.get('step') or row['server']}: {row['failed']}" for row in rows if "failed" in row]
    return "\n".join(lines + (["", "Not measured:", *failed] if failed else []))


def throughput_table(rows: Sequence[Row], workload: str) -> str:
    """A workload's figures, one row for each server and load; empty where it was not measured."""
    chosen = [row for row in rows if row.get("workload") == workload]
    keys = [key for key in _COLUMNS if any(key in row for row in chosen)]
    if not chosen:
        return ""
    lines = [f"Workload {workload}:", "", _line([_COLUMNS[key] for key in keys]), "|---" * len(keys) + "|"]
    return "\n".join(lines + [_line([row.get(key, "") for key in keys]) for row in chosen])


def _line(values: Sequence[Any]) -> str:
    return "| " + " | ".join(map(str, values)) + " |"


def _plot(result: Path, rows: Sequence[Row]) -> list[Path]:
    if not rows:
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plots = []
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for server, its_rows in _by_server(rows).items():
        axes.plot(
            [row["concurrency"] for row in its_rows], [row["tokens_per_s"] for row in its_rows], "o-", label=server
        )
    axes.set(xlabel="streams", ylabel="output tokens/s", xscale="log", yscale="log", title="Throughput")
    axes.set_xticks(sorted({row["concurrency"] for row in rows}), minor=False)
    axes.get_xaxis().set_major_formatter(matplotlib.ticker.ScalarFormatter())
    plots.append(_saved(figure, axes, result, "throughput"))

    for key, name in _LATENCIES.items():
        levels = sorted({row["concurrency"] for row in rows})
        figure, all_axes = pyplot.subplots(1, len(levels), figsize=(4 * len(levels), 3.8), squeeze=False)
        for axes, concurrency in zip(all_axes[0], levels, strict=True):
            for row in rows:
                if row["concurrency"] == concurrency and f"{key}_curve_ms" in row:
                    percents, values = zip(*row[f"{key}_curve_ms"], strict=True)
                    axes.plot(values, percents, label=row["server"])
            axes.set(xlabel=f"{name}, ms", ylabel="% of tokens" if key == "itl" else "% of requests", xscale="log")
            axes.set_title(f"{concurrency} streams")
        plots.append(_saved(figure, all_axes[0][0], result, key))
    return plots


def _by_server(rows: Sequence[Row]) -> dict[str, list[Row]]:
    servers: dict[str, list[Row]] = {}
    for row in rows:
        if row["tokens_per_s"]:
            servers.setdefault(row["server"], []).append(row)
    return servers


def _saved(figure: Any, axes: Any, result: Path, name: str) -> Path:
    axes.legend(fontsize=8)
    for each in figure.axes:
        each.grid(True, alpha=0.3)
    figure.tight_layout()
    path = result.with_name(f"{result.stem}-{name}.png")
    figure.savefig(path, dpi=110)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="result file of benchmarks.suite")
    print(write(parser.parse_args().result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
