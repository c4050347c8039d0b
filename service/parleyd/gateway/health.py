"""`grpc.health.v1`: whether this replica should get traffic."""

from __future__ import annotations

import asyncio
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICES = ("", "parley.v1.ChatService")

# Kept as long as a watch lasts, and whoever can connect may have thousands.
_MAX_REQUEST_OCTETS = 256

Context = grpc.aio.ServicerContext[Any, Any]


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """The standard health service, for the server as a whole and for ChatService, which are always alike.

    Not grpc_health's own: that one writes to each watcher under a lock that it needs to change the status, so that one
    client that reads nothing holds up the start, the shutdown and all other watchers.
    """

    def __init__(self) -> None:
        self.is_serving = False
        self._is_shut_down = False
        self._changed = asyncio.Event()

    def set_serving(self, serving: bool) -> None:
        """Tells watchers and later checks; nothing after `shut_down`."""
        self.is_serving = serving and not self._is_shut_down
        self._changed.set()
        self._changed = asyncio.Event()

    def shut_down(self) -> None:
        """NOT_SERVING from now on, whatever happens later."""
        self._is_shut_down = True
        self.set_serving(False)

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        """See grpc.health.v1."""
        if request.service not in SERVICES:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def List(self, request: health_pb2.HealthListRequest, context: Context) -> health_pb2.HealthListResponse:
        """See grpc.health.v1."""
        statuses = {name: health_pb2.HealthCheckResponse(status=self._status(name)) for name in SERVICES}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """See grpc.health.v1. Slow readers miss statuses that have changed again, never the last one."""
        if request.ByteSize() > _MAX_REQUEST_OCTETS:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"more than {_MAX_REQUEST_OCTETS} octets")
        try:
            await self._tell(request.service, context)
        except grpc.aio.InternalError as error:
            # The connection broke before gRPC could cancel us: as if it had, and no stack in the log.
            raise asyncio.CancelledError from error

    async def _tell(self, service: str, context: Context) -> NoReturn:
        told = None
        while True:
            changed = self._changed  # before the write, during which the status may change
            if (status := self._status(service)) != told:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                told = status
            await changed.wait()

    def _status(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        if service not in SERVICES:
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        if self.is_serving:
            return health_pb2.HealthCheckResponse.SERVING
        return health_pb2.HealthCheckResponse.NOT_SERVING
