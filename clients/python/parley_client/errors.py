"""Everything a call can raise. A class stands for one reason of the contract; status.py rebuilds them from the wire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import grpc


@dataclass(frozen=True)
class Violation:
    """One thing wrong with a request: `field` is a path such as `messages[1].role`."""

    field: str
    description: str


class ParleyError(Exception):
    """A call failed. The subclass tells why; this class itself stands for what this version has no name for.

    Attributes:
        code: the gRPC status code.
        reason: the contract's name for the cause, such as "QUEUE_FULL"; None where the server named none, as in
            statuses that the gRPC library makes itself.
        message: the text for people.
        metadata: further facts, as the reason defines them.
        request_id: the request's id, to find it in the server's log; None if it never reached a server.
        violations: every wrong field, of an InvalidRequest.
        retry_after_s: seconds after which another try makes sense; None where the server tells none.
    """

    default_code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN
    default_reason: ClassVar[str | None] = None

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        request_id: str | None = None,
        violations: Sequence[Violation] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.reason = reason or self.default_reason
        self.metadata = dict(metadata or {})
        self.request_id = request_id
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s


class InvalidRequest(ParleyError):
    """Fields out of range or contradicting each other; `violations` names each. Also raised before anything is sent,
    for values that cannot be encoded."""

    default_code = grpc.StatusCode.INVALID_ARGUMENT
    default_reason = "INVALID_REQUEST"

    @classmethod
    def at(cls, field: str, description: str) -> InvalidRequest:
        """The error for one wrong field, found before the request is sent."""
        return cls(f"invalid request: {field}: {description}", violations=[Violation(field, description)])


class PromptTooLong(ParleyError):
    """The prompt leaves no room for a single new token."""

    default_code = grpc.StatusCode.INVALID_ARGUMENT
    default_reason = "PROMPT_TOO_LONG"

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt after the chat template."""
        return int(self.metadata["prompt_tokens"])

    @property
    def max_context_tokens(self) -> int:
        """Tokens that prompt and answer together may have."""
        return int(self.metadata["max_context_tokens"])


class ModelNotFound(ParleyError):
    """The request names a model that is not served here."""

    default_code = grpc.StatusCode.NOT_FOUND
    default_reason = "MODEL_NOT_FOUND"

    @property
    def served(self) -> tuple[str, ...]:
        """The names that are served."""
        return tuple(name for name in self.metadata.get("served", "").split(",") if name)


class QueueFull(ParleyError):
    """A limit on waiting requests, memory or streams is reached; `retry_after_s` says when to try again."""

    default_code = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = "QUEUE_FULL"


class DeadlineExceeded(ParleyError):
    """`timeout` passed, or is certain to pass before the first token."""

    default_code = grpc.StatusCode.DEADLINE_EXCEEDED
    default_reason = "DEADLINE_EXCEEDED"


class Unavailable(ParleyError):
    """The service cannot answer now; a later try may work. Subclasses tell why."""

    default_code = grpc.StatusCode.UNAVAILABLE


class NotReady(Unavailable):
    """The model is still loading."""

    default_reason = "NOT_READY"


class Draining(Unavailable):
    """The server is shutting down and takes no new calls."""

    default_reason = "DRAINING"


class WorkerLost(Unavailable):
    """The process that held the model died, and the server has given up replacing it."""

    default_reason = "WORKER_LOST"


class ConnectionFailed(Unavailable):
    """No connection to a server, or the connection broke."""


class Unsupported(ParleyError):
    """This model or build cannot do it."""

    default_code = grpc.StatusCode.FAILED_PRECONDITION
    default_reason = "UNSUPPORTED"

    @property
    def field(self) -> str:
        """Path of the field that asks for it; empty if the server names none."""
        return self.metadata.get("field", "")


class Unauthenticated(ParleyError):
    """No credentials, or wrong ones."""

    default_code = grpc.StatusCode.UNAUTHENTICATED
    default_reason = "UNAUTHENTICATED"


class PermissionDenied(ParleyError):
    """These credentials do not allow it."""

    default_code = grpc.StatusCode.PERMISSION_DENIED
    default_reason = "PERMISSION_DENIED"


class Internal(ParleyError):
    """A fault of the server; its log knows more under `request_id`."""

    default_code = grpc.StatusCode.INTERNAL
    default_reason = "INTERNAL"


class IncompleteStream(ParleyError):
    """The stream ended as if all were well, but without a finish reason: part of the answer is missing."""

    default_code = grpc.StatusCode.INTERNAL


class Cancelled(ParleyError):
    """The call was cancelled, by this program or on the way."""

    default_code = grpc.StatusCode.CANCELLED


class Unimplemented(ParleyError):
    """The server does not know the method: it is no Parley server, or an older one."""

    default_code = grpc.StatusCode.UNIMPLEMENTED


class MessageTooLarge(ParleyError):
    """The request is larger than the server accepts; or a proxy's limit is reached, such as one on calls per minute.
    gRPC and proxies tell both by the code alone: see `message`."""

    default_code = grpc.StatusCode.RESOURCE_EXHAUSTED


BY_REASON: Mapping[str, type[ParleyError]] = {
    cls.default_reason: cls
    for cls in (
        InvalidRequest,
        PromptTooLong,
        ModelNotFound,
        QueueFull,
        DeadlineExceeded,
        NotReady,
        Draining,
        WorkerLost,
        Unsupported,
        Unauthenticated,
        PermissionDenied,
        Internal,
    )
    if cls.default_reason is not None
}
