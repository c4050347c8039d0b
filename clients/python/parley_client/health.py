"""The standard health service: its states, and waiting for a server to serve."""

from __future__ import annotations

import math
import time
from enum import StrEnum

import grpc
from grpc_health.v1 import health_pb2

from parley_client.errors import DeadlineExceeded, ParleyError, Unavailable
from parley_client.patience import time_limit

RETRY_DELAY_S = 0.1  # between two watches, should a server end them at once


class HealthStatus(StrEnum):
    """Whether a server takes calls."""

    UNKNOWN = "UNKNOWN"
    SERVING = "SERVING"
    NOT_SERVING = "NOT_SERVING"  # loading, shutting down, or broken
    SERVICE_UNKNOWN = "SERVICE_UNKNOWN"  # the server does not know the service asked for

    @classmethod
    def from_proto(cls, response: health_pb2.HealthCheckResponse) -> HealthStatus:
        """The state in a response of the health service."""
        names = health_pb2.HealthCheckResponse.ServingStatus.DESCRIPTOR.values_by_number
        return cls(names[response.status].name) if response.status in names else cls.UNKNOWN

    @classmethod
    def from_error(cls, error: ParleyError) -> HealthStatus:
        """The state that a failed check tells. Raises the error where it tells none."""
        if error.code is grpc.StatusCode.NOT_FOUND:
            return cls.SERVICE_UNKNOWN
        raise error


class ReadinessWait:
    """The patience of one `wait_until_ready`: what is left of it, and what to tell when it is used up."""

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._expires = time.monotonic() + time_limit(timeout)
        self.last_seen = "no answer from the server"

    def remaining_s(self) -> float | None:
        """Seconds left; None if there is no limit.

        Raises:
            DeadlineExceeded: none is left.
        """
        remaining = self._expires - time.monotonic()
        if remaining <= 0:
            raise DeadlineExceeded(f"not ready within {self._timeout:g} s: {self.last_seen}")
        return None if remaining == math.inf else remaining

    def saw(self, status: HealthStatus) -> bool:
        """Notes a state; whether it is the one waited for."""
        self.last_seen = f"the server is {status}"
        return status is HealthStatus.SERVING

    def saw_error(self, error: ParleyError) -> None:
        """Notes that a watch failed, as it does while the server is being started.

        Raises:
            ParleyError: waiting on would not help, or no time is left.
        """
        if error.code is grpc.StatusCode.DEADLINE_EXCEEDED:
            self.remaining_s()  # raises where it is ours; else a proxy has ended a watch that lasted
            return
        if not isinstance(error, Unavailable):  # those that a proxy resets have another code
            raise error
        self.last_seen = error.message
