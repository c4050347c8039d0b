"""The command `parleyd`, also as `python -m parleyd`."""

import sys


def main() -> int:
    """Runs `parleyd.cli.main`; a Ctrl-C that comes while it is still imported ends as quietly as a later one."""
    try:
        from parleyd import cli

        return cli.main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
