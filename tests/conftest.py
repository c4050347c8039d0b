"""For all tests."""

import os
from pathlib import Path

# As in worker/__main__.py, and before any test imports torch: spinning threads of several processes starve each other.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Without a GPU, Triton's kernels can be interpreted, slowly; it must be known before it is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
