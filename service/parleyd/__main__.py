"""`python -m parleyd`."""

import sys

from parleyd.cli import main

sys.exit(main())
