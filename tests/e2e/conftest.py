"""Fixtures of the end-to-end tests: `parleyd serve` with the real embedded model, and that model in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.served import ServedProcess


@pytest.fixture(scope="session")
def served() -> Iterator[ServedProcess]:
    """One server, in float32 so that its ids can be held against the model's own, for tests that leave it as it was."""
    with ServedProcess("--dtype", "float32", "--drain-delay", "0") as process:
        process.wait_health()
        yield process
        assert process.terminate() == 0
