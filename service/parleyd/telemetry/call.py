"""The call that the running task serves: its request id and clock, for logs and timings."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class Call:
    """One RPC, or one item of a batch. `arrived` and `deadline` are on the monotonic clock, in seconds.

    `identity` names the caller, such as `key:billing`. What happened to it is None until it happens: `queue_s` and
    `first_token_s` in seconds from arrival, `refusal` the reason of the error that ended it.
    """

    method: str
    request_id: str
    arrived: float = field(default_factory=time.monotonic)
    deadline: float | None = None
    identity: str = ""
    may_set_priority: bool = False
    queue_s: float | None = None
    first_token_s: float | None = None
    refusal: str | None = None

    def elapsed(self) -> float:
        """Seconds since arrival."""
        return time.monotonic() - self.arrived

    @property
    def cancelled_code(self) -> str:
        """The status code of this call if it is cancelled now."""
        is_late = self.deadline is not None and self.deadline <= time.monotonic()
        return "DEADLINE_EXCEEDED" if is_late else "CANCELLED"


current_call: ContextVar[Call] = ContextVar("current_call")
