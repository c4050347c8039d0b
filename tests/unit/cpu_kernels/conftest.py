"""The kernels share their work out to threads, so all tests of them have two."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def threads(two_threads: None) -> None:
    """See `two_threads`."""
