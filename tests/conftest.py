"""For all tests."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# In the background, a shell has SIGINT ignored, and so would the processes that tests send it to.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# As in worker/__main__.py, and before any test imports torch: spinning threads of several processes starve each other.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Side by side, as `make test` runs most, each takes one core.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without a GPU, Triton's kernels can be interpreted, slowly; it must be known before it is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.support.side_by_side import FilesAndServers

    return FilesAndServers(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For what shares its work out to threads, however many this process has otherwise."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
