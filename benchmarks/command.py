"""What the command lines of online.py and offline.py have in common: options, and the result file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.environment import bandwidth_gb_per_s, describe
from benchmarks.summary import Row

RESULTS = Path(__file__).parent / "results"


def build_parser(description: str | None, result: str, peers: Iterable[str]) -> argparse.ArgumentParser:
    """`result`: the result file's name; `peers`: those that can be compared with."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64], help="(default: 1 4 16 64)")
    add("--requests", type=int, help="requests a round (default: twice the concurrency, at least 4)")
    add("--new-tokens", type=int, default=128, help="tokens of each answer (default: %(default)s)")
    add("--rounds", type=int, default=3, help="rounds, of which medians count (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--serve", default="", help="arguments of parleyd serve, such as '--no-packed-linear'")
    add("--peer", action="append", default=[], choices=[*peers], help="a peer to compare with; may be given again")
    add_peers_folder(parser)
    add("--json", type=Path, default=RESULTS / result, help="result file (default: benchmarks/results/)")
    return parser


def add_peers_folder(parser: argparse.ArgumentParser) -> None:
    text = "folder of the peers' environments (default: %(default)s)"
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help=text)


def num_requests(arguments: argparse.Namespace, concurrency: int) -> int:
    """Requests of a round."""
    return int(arguments.requests or max(4, 2 * concurrency))


def write_result(file: Path, rows: list[Row]) -> None:
    """Rows and where they were measured, as JSON; the latter is printed too."""
    environment = {**describe(), "memory_gb_per_s": f"{bandwidth_gb_per_s():.1f}"}
    report = {"environment": environment, "arguments": " ".join(sys.argv[1:]), "rows": rows}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report) + "\n")
    print(json.dumps(environment, indent=2))
