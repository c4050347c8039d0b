"""`python -m parleyd.grammar FD`: the checker process, started by the gateway when a request first needs it."""

import os
import resource
import sys

from parleyd.grammar.checker import run

# A grammar that takes more memory ends the process, and is refused for it.
_MAX_BYTES = 2 * 2**30
resource.setrlimit(resource.RLIMIT_AS, (_MAX_BYTES, _MAX_BYTES))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

run(int(sys.argv[1]))
os._exit(0)
