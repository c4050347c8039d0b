"""A process that converts the embedded model: `python -m tests.e2e.model.conversion_process CACHE [MAX_FILE_BYTES]`."""

from __future__ import annotations

import logging
import resource
import sys

from parleyd.errors import StartupError
from parleyd.model.conversion import converted
from parleyd.model.embedded import find_embedded_model


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if len(sys.argv) > 2:  # fails writes as a full disk does, and needs no privileges
        limit = int(sys.argv[2])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        print(converted(find_embedded_model(), sys.argv[1]))
    except StartupError as error:
        print(f"StartupError: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
