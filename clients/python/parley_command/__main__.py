"""The command `parley`, also as `python -m parley_command`."""

import os
import sys


def main() -> int:
    """Runs `parley_client.cli.main`; a Ctrl-C that comes while it is still imported ends as quietly as a later one."""
    # gRPC's own lines would stand among ours, one for each handshake that fails; what we must know it raises as well.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        from parley_client import cli

        return cli.main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
