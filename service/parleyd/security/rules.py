"""The fields that say what a client may do, wherever a file has them: by each API key, by each pattern of names."""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from parleyd.errors import StartupError
from parleyd.security.caller import Rules


class RuleFields(msgspec.Struct, frozen=True, kw_only=True):
    """What an entry may say; None leaves it to the service's settings."""

    rpcs: list[str] | None = None
    priorities: bool | None = None
    max_open_calls: int | None = None
    requests_per_minute: int | None = None

    def rules(self, entry: str, rpcs: Collection[str], defaults: Rules) -> Rules:
        """Raises StartupError, which begins with `entry`, for what is not among `rpcs` and for limits below 1."""
        if unknown := sorted(set(self.rpcs or ()) - set(rpcs)):
            raise StartupError(f"{entry}: rpcs: no {unknown[0]!r}, only {', '.join(rpcs)}")
        for field in ("max_open_calls", "requests_per_minute"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise StartupError(f"{entry}: {field} must be 1 or more")
        return Rules(
            rpcs=defaults.rpcs if self.rpcs is None else frozenset(self.rpcs),
            priorities=defaults.priorities if self.priorities is None else self.priorities,
            max_open_calls=self.max_open_calls or defaults.max_open_calls,
            requests_per_minute=self.requests_per_minute or defaults.requests_per_minute,
        )
