"""`python -m parleyd.worker FD`: the worker process, started by the gateway's supervisor."""

import gc
import logging
import multiprocessing
import os
import sys

from parleyd.config import ModelSettings
from parleyd.engine.engine import Engine
from parleyd.generation import ModelInfo
from parleyd.model.cgroup import cpu_quota
from parleyd.telemetry.logging import flush
from parleyd.worker.openmp import openmp_variables
from parleyd.worker.process import run

_logger = logging.getLogger("parleyd.worker")


def load_engine(settings: ModelSettings) -> tuple[Engine, ModelInfo]:
    """Imports torch only here, so that the process hears its gateway go away even during that second."""
    # Collecting garbage among the million objects that imports make costs a fifth of the start. They stay
    # for good, so later collections need not look at them either.
    gc.disable()
    # By any other method a library's first progress bar starts a process, which outlives this one and warns of a leak.
    multiprocessing.set_start_method("fork")
    quota = cpu_quota()
    variables = openmp_variables(os.environ, settings.bind_threads, quota)
    os.environ.update(variables)
    if num_threads := variables.get("OMP_NUM_THREADS"):
        _logger.info("threads that compute: %s, as a limit leaves %.2f processors' time", num_threads, quota)
    loaded = _load_unbound(settings) if "OMP_PROC_BIND" in variables else _load(settings)
    gc.freeze()
    gc.enable()
    return loaded


def _load(settings: ModelSettings) -> tuple[Engine, ModelInfo]:
    from parleyd.worker.load import load

    return load(settings)


def _load_unbound(settings: ModelSettings) -> tuple[Engine, ModelInfo]:
    """Where OpenMP binds threads, this one is bound as torch is imported, and so is all that it starts from then on,
    such as the threads that read the weights: not while it loads."""
    all_processors = os.sched_getaffinity(0)
    from parleyd.worker.load import load

    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, all_processors)
    loaded = load(settings)
    os.sched_setaffinity(0, own)
    return loaded


code = run(int(sys.argv[1]), load_engine)
flush()
# Libraries leave threads behind, and none of them is worth waiting for: hence not sys.exit.
os._exit(code)
