"""The latest verdicts on grammars, within a bound of memory: a grammar may have megabytes."""

from __future__ import annotations

import sys
from collections import OrderedDict

from parleyd.ipc.messages import GrammarChecked

_MAX_BYTES = 32 * 2**20
_ENTRY_BYTES = 1024  # what a verdict takes beside its texts, roundly


class VerdictCache:
    """Verdicts by their questions' keys. What was asked for longest ago goes first."""

    def __init__(self, max_bytes: int = _MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._verdicts: OrderedDict[bytes, GrammarChecked] = OrderedDict()

    def get(self, key: bytes) -> GrammarChecked | None:
        """The verdict, if it is still here."""
        if (verdict := self._verdicts.get(key)) is not None:
            self._verdicts.move_to_end(key)
        return verdict

    def put(self, key: bytes, verdict: GrammarChecked) -> None:
        """Keeps a verdict, in place of an earlier one. One beyond the bound is not kept."""
        self.drop(key)
        self._verdicts[key] = verdict
        self._num_bytes += _num_bytes(verdict)
        while self._num_bytes > self._max_bytes:
            self.drop(next(iter(self._verdicts)))

    def drop(self, key: bytes) -> None:
        """Forgets a verdict, if it is still here."""
        if (verdict := self._verdicts.pop(key, None)) is not None:
            self._num_bytes -= _num_bytes(verdict)


def _num_bytes(verdict: GrammarChecked) -> int:
    texts = (verdict.grammar, verdict.error, verdict.unsupported, *verdict.errors, *verdict.errors.values())
    return _ENTRY_BYTES + sum(map(sys.getsizeof, texts))
