"""Which tests stay together where several processes share them out."""

from __future__ import annotations

import re

from xdist.scheduler import LoadFileScheduling

# Tests of an engine's server, as their ids tell.
_SERVED = re.compile(r"tests/e2e/[^[]*\[(batching|generate)\b")


class FilesAndServers(LoadFileScheduling):
    """Those of a file; and of tests/e2e all that share a server, which takes longer to start than most of them."""

    def _split_scope(self, nodeid: str) -> str:
        served = _SERVED.match(nodeid)
        return served[1] if served else str(super()._split_scope(nodeid))
