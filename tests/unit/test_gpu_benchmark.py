"""benchmarks/gpu.py runs from end to end where there is no GPU, on a toy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_gpu_benchmark_runs_on_a_toy(tmp_path: Path) -> None:
    into = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--new-tokens", "64"]
    result = subprocess.run([*command, "--json", str(into)], cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert result.returncode == 0, result.stderr
    report = json.loads(into.read_text())
    assert report["device"] == "cpu" and report["tiny"]
    assert report["one_stream_tokens_per_s"] > 0 and report["step_ms"] > 0 and report["copy_bandwidth_gb_per_s"] > 0
    assert "grpcio" in report and "target" in result.stdout
