"""What every ChatService call leaves behind: an observation when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from parleyd.telemetry.call import current_call

Context = grpc.aio.ServicerContext[Any, Any]
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]
Observe = Callable[[str, str], None]


class TelemetryInterceptor(grpc.aio.ServerInterceptor):
    """Goes around all others but FirstMessageInterceptor. `observe` gets each call's method and status code, in the
    task that served it."""

    def __init__(self, service: str, observe: Observe) -> None:
        self._prefix = f"/{service}/"
        self._observe = observe

    async def intercept_service(self, continuation: Continuation, details: grpc.HandlerCallDetails) -> Any:
        """See grpc.aio.ServerInterceptor."""
        handler: Any = await continuation(details)
        if handler is None or not details.method.startswith(self._prefix):
            return handler
        method = details.method.removeprefix(self._prefix)
        kinds = ("unary_stream", "stream_stream")  # all that CallInterceptor makes
        return handler._replace(**{kind: self._wrap(method, f) for kind in kinds if (f := getattr(handler, kind))})

    def _wrap(self, method: str, behaviour: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        async def handle(request: Any, context: Context) -> None:
            code = "UNKNOWN"
            try:
                await behaviour(request, context)
                code = "OK"
            except asyncio.CancelledError:
                call = current_call.get(None)
                code = call.cancelled_code if call else "CANCELLED"
                raise
            except grpc.aio.AbortError:
                code = context.code().name
                raise
            finally:
                self._observe(method, code)

        return handle
