"""For all tests."""

import os

# As in worker/__main__.py, and before any test imports torch: spinning threads of several processes starve each other.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
