"""Fixtures of the end-to-end tests: `parleyd serve` with the real embedded model, and that model in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.served import ServedProcess


@pytest.fixture(scope="session", params=["batching", "generate"])
def served(request: pytest.FixtureRequest) -> Iterator[ServedProcess]:
    """One server of each engine, in float32 so that its ids can be held against the model's own."""
    with ServedProcess("--engine", request.param, "--dtype", "float32", "--drain-delay", "0") as process:
        process.wait_health()
        yield process
        assert process.terminate() == 0
