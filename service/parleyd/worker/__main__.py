"""`python -m parleyd.worker FD`: the worker process, started by the gateway's supervisor."""

import gc
import os
import sys

from parleyd.config import ModelSettings
from parleyd.engine.engine import Engine
from parleyd.generation import ModelInfo
from parleyd.worker.process import run

# OpenMP's threads wait by spinning. Where anything else uses the cores, that makes a forward pass tens of times slower:
# spin briefly, then sleep. Must be set before torch is imported; what the operator sets stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def load_engine(settings: ModelSettings) -> tuple[Engine, ModelInfo]:
    """Imports torch only here, so that the process hears its gateway go away even during that second."""
    # Collecting garbage among the million objects that imports make costs a fifth of the start. They stay
    # for good, so later collections need not look at them either.
    gc.disable()
    from parleyd.worker.load import load

    loaded = load(settings)
    gc.freeze()
    gc.enable()
    return loaded


# Libraries leave threads behind, and none of them is worth waiting for: hence not sys.exit.
os._exit(run(int(sys.argv[1]), load_engine))
