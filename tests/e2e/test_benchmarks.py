"""The benchmarks run: each program once, with as little as it can do, against the real model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_TINY = ["--concurrency", "2", "--requests", "3", "--new-tokens", "4", "--rounds", "1"]


def run(module: str, result: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"benchmarks.{module}", *_TINY, "--json", str(result), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    content: dict[str, Any] = json.loads(result.read_text())
    assert content["environment"]["cpu"] and content["environment"]["commit"]
    return content


def check(row: dict[str, Any]) -> None:
    assert row["num_answers"] == 3  # of exactly the wanted length
    assert row["tokens_per_s"] > 0 and row["gb_per_s"] > 0 and 0 < row["share_of_bandwidth"] < 1
    for time in ("ttft", "itl"):
        assert 0 < row[f"{time}_p50_ms"] <= row[f"{time}_p95_ms"] <= row[f"{time}_p99_ms"]


def test_the_engine_alone_is_measured(tmp_path: Path) -> None:
    (row,) = run("offline", tmp_path / "offline.json")["rows"]
    check(row)


def test_the_service_is_measured_against_itself(tmp_path: Path) -> None:
    first, second = run("online", tmp_path / "online.json", "--against", "--engine generate")["rows"]
    check(first)
    check(second)
    assert second["ratio_of_first"] > 0


@pytest.mark.parametrize("module", ["online", "suite", "report", "gateway_cpu", "overload"])
def test_help_is_there(module: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{module}", "--help"]
    assert "usage" in subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
