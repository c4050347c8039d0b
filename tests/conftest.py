"""For all tests."""

import os
from pathlib import Path

# As in worker/__main__.py, and before any test imports torch: spinning threads of several processes starve each other.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Side by side (`make test` runs the tests of single modules so), each takes one core.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without a GPU, Triton's kernels can be interpreted, slowly; it must be known before it is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
