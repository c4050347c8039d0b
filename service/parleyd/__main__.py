"""The command `parleyd`, also as `python -m parleyd`."""

import os
import signal
import sys


def main() -> int:
    """Runs `parleyd.cli.main`; a Ctrl-C that comes while it is still imported ends as quietly as a later one."""
    # Until there is more to do than to leave. Without a handler the kernel drops the signal where we are PID 1.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
    try:
        from parleyd import cli

        return cli.main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
