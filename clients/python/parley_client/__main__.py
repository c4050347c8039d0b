"""`python -m parley_client` is `parley`."""

import sys

from parley_client.cli import main

sys.exit(main())
