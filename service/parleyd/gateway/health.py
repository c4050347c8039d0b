"""`grpc.health.v1`: whether this replica should get traffic."""

from __future__ import annotations

from grpc_health.v1 import health, health_pb2

SERVICES = ("", "parley.v1.ChatService")


class Health:
    """The standard health service, for the server as a whole and for ChatService."""

    def __init__(self) -> None:
        self.servicer = health.aio.HealthServicer()
        self.is_serving = False

    async def set_serving(self, serving: bool) -> None:
        """Tells watchers and later checks."""
        self.is_serving = serving
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in SERVICES:
            await self.servicer.set(service, status)

    async def shut_down(self) -> None:
        """NOT_SERVING from now on, whatever happens later."""
        self.is_serving = False
        await self.servicer.enter_graceful_shutdown()
