"""The call that the running task serves: its request id and clock, for logs and timings."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # an extra, which not every server has
    from opentelemetry.trace import Span

# A client cancels at its own deadline, which is earlier than the one it told: gRPC rounds that up by a hundredth at
# most, and it was on its way.
_ROUNDED_UP, _ON_ITS_WAY_S = 0.01, 0.02


@dataclass
class Call:
    """One RPC, or one item of a batch. `arrived` and `deadline` are on the monotonic clock, in seconds; `arrived_ns` is
    the wall clock's time of arrival, in nanoseconds.

    `identity` names the caller, such as `key:billing`; `trace_context` holds the headers of its W3C trace, if it sent
    any. An item arrives with its `batch`, in which it has an `index`. What happened to it is None until it happens:
    `queue_s` and `first_token_s` in seconds from arrival, `refusal` the reason of the error that ended it; `span` is
    made by telemetry/tracing.py.
    """

    method: str
    request_id: str
    arrived: float = field(default_factory=time.monotonic)
    arrived_ns: int = field(default_factory=time.time_ns)
    deadline: float | None = None
    identity: str = ""
    trace_context: Mapping[str, str] = field(default_factory=dict)
    batch: Call | None = None
    index: int = 0
    may_set_priority: bool = False
    queue_s: float | None = None
    first_token_s: float | None = None
    refusal: str | None = None
    span: Span | None = field(default=None, init=False)

    def elapsed(self) -> float:
        """Seconds since arrival."""
        return time.monotonic() - self.arrived

    @property
    def cancelled_code(self) -> str:
        """The status code of this call if it is cancelled now."""
        if self.deadline is None:
            return "CANCELLED"
        tolerance_s = _ROUNDED_UP * (self.deadline - self.arrived) + _ON_ITS_WAY_S
        return "DEADLINE_EXCEEDED" if time.monotonic() >= self.deadline - tolerance_s else "CANCELLED"


current_call: ContextVar[Call] = ContextVar("current_call")
