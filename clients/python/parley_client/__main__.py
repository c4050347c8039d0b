"""`python -m parley_client` is `parley`, without what that does before gRPC is imported (`parley_command`)."""

import sys

from parley_client.cli import main

sys.exit(main())
