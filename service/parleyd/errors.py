"""Every failure the service can name. rpc/status.py turns each into a gRPC status; nothing here knows gRPC."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Reason(Enum):
    """Short names of `parley.v1.ErrorReason` values, as they stand in `google.rpc.ErrorInfo.reason`."""

    INVALID_REQUEST = "INVALID_REQUEST"
    PROMPT_TOO_LONG = "PROMPT_TOO_LONG"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    QUEUE_FULL = "QUEUE_FULL"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    NOT_READY = "NOT_READY"
    DRAINING = "DRAINING"
    WORKER_LOST = "WORKER_LOST"
    UNSUPPORTED = "UNSUPPORTED"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True)
class Violation:
    """One thing wrong with a request: `field` is a path such as `messages[1].role`."""

    field: str
    description: str


class ParleyError(Exception):
    """A call failed for a reason the contract names.

    `metadata` goes into `google.rpc.ErrorInfo.metadata`; `retry_after_s`, where set, into `google.rpc.RetryInfo`.
    """

    reason: Reason = Reason.INTERNAL
    retry_after_s: float | None = None

    def __init__(self, message: str, metadata: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = metadata or {}


class InvalidRequest(ParleyError):
    """Fields out of range or contradicting each other; carries every violation, or so many that no status holds more:
    then `are_all` is false."""

    reason = Reason.INVALID_REQUEST

    def __init__(self, violations: list[Violation], *, are_all: bool = True) -> None:
        first = violations[0]
        text = f"{first.field}: {first.description}" if first.field else first.description
        self.violations = violations
        self._at_least = "" if are_all else "at least "
        more = f" ({self.rest(1)})" if len(violations) > 1 else ""
        super().__init__(f"invalid request: {text}{more}")

    def rest(self, num_told: int) -> str:
        """How many violations there are besides those that are told."""
        return f"and {self._at_least}{len(self.violations) - num_told} more"


class PromptTooLong(ParleyError):
    """The prompt leaves no room for a single new token."""

    reason = Reason.PROMPT_TOO_LONG

    def __init__(self, prompt_tokens: int, max_context_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        super().__init__(
            f"the prompt has {prompt_tokens} tokens, but the model's context holds {max_context_tokens} "
            "and an answer needs at least one",
            {"prompt_tokens": str(prompt_tokens), "max_context_tokens": str(max_context_tokens)},
        )


class ModelNotFound(ParleyError):
    """The request names a model that is not served here."""

    reason = Reason.MODEL_NOT_FOUND

    def __init__(self, model: str, served: list[str]) -> None:
        super().__init__(
            f"model {model!r} is not served here; served: {', '.join(served)}", {"served": ",".join(served)}
        )


class Unsupported(ParleyError):
    """This model or build cannot do what `field` asks for."""

    reason = Reason.UNSUPPORTED

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}", {"field": field})


class QueueFull(ParleyError):
    """No room for another waiting request."""

    reason = Reason.QUEUE_FULL

    def __init__(self, what: str, retry_after_s: float) -> None:
        super().__init__(f"{what}; try again in {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class ClientLimit(QueueFull):
    """One client has reached a limit of its own."""


class Unauthenticated(ParleyError):
    """No credentials, or wrong ones. `why` is for the log alone: a client is not told which part failed."""

    reason = Reason.UNAUTHENTICATED

    def __init__(self, why: str) -> None:
        super().__init__("no credentials, or wrong ones")
        self.why = why


class PermissionDenied(ParleyError):
    """The client is known, and may not do this."""

    reason = Reason.PERMISSION_DENIED


class DeadlineExceeded(ParleyError):
    """The call's deadline passed before the work could be done."""

    reason = Reason.DEADLINE_EXCEEDED

    def __init__(self, message: str = "the deadline passed") -> None:
        super().__init__(message)


class SlowReader(ParleyError):
    """The client stopped reading its answer, which we cannot keep for ever."""

    reason = Reason.QUEUE_FULL

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"nothing of the answer was read for {timeout_s:g} s")
        self.retry_after_s = 0.0


class NotReady(ParleyError):
    """The model is still loading."""

    reason = Reason.NOT_READY
    retry_after_s = 1.0

    def __init__(self) -> None:
        super().__init__("the model is still loading")


class Draining(ParleyError):
    """The server is shutting down and takes no new calls."""

    reason = Reason.DRAINING
    retry_after_s = 1.0

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class WorkerLost(ParleyError):
    """The process that held the model died, and cannot be brought back."""

    reason = Reason.WORKER_LOST

    def __init__(self, message: str = "the worker process cannot be brought back") -> None:
        super().__init__(message)


class EngineFault(ParleyError):
    """The engine failed on one request; a fault of ours."""

    reason = Reason.INTERNAL


class StartupError(Exception):
    """The service cannot start or go on; the message is one line for the person who started it."""
