"""What every ChatService call goes through: credentials, request id, limits, statuses, trailers, the log line.

Handlers raise ParleyErrors and know nothing of gRPC statuses; any other exception is a fault of ours.
"""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractContextManager, aclosing, contextmanager, nullcontext
from typing import Any, NoReturn

import grpc

from parleyd.errors import EngineFault, InvalidRequest, ParleyError, Reason, SlowReader, Unauthenticated, Violation
from parleyd.rpc import status
from parleyd.rpc.first_message import NO_MESSAGE, Undecodable
from parleyd.rpc.load_report import LOAD_REPORT_KEY
from parleyd.rpc.open_calls import OpenCalls
from parleyd.rpc.reader_watch import ReaderWatch
from parleyd.security.caller import Caller, address_identity
from parleyd.security.guard import Guard
from parleyd.telemetry.call import Call, current_call

REQUEST_ID_KEY = "x-request-id"
TRACE_CONTEXT_KEYS = ("traceparent", "tracestate")
REQUEST_ID_PATTERN = re.compile(r"[A-Za-z0-9._:-]{1,128}")
MAX_BATCH_REQUESTS = 1024

# gRPC's own limit, which binds only clients that have acknowledged our settings; and what RFC 9113 adds for each entry.
_MAX_METADATA_OCTETS = 16 * 1024
_ENTRY_OCTETS = 32

# Probes have no credentials.
_HEALTH_PREFIX = "/grpc.health.v1.Health/"

_logger = logging.getLogger("parleyd.rpc")

Context = grpc.aio.ServicerContext[Any, Any]
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps one service's handlers. `enter` gets the caller's identity as each call begins and may refuse it; `leave`
    as it ends; `report` makes the load report that goes with its status, and gets the error that ended it, if any did;
    `unread` lasts from when a client has stopped reading to when it reads on or goes away.

    Other services only have their callers' credentials checked, and health not even that. Stands inside a
    FirstMessageInterceptor, which has an Undecodable where there is no request.
    """

    def __init__(
        self,
        service: str,
        guard: Guard,
        enter: Callable[[str, int], None],
        leave: Callable[[str, int], None],
        report: Callable[[ParleyError | None], bytes],
        unread: Callable[[], AbstractContextManager[None]] = nullcontext,
        slow_reader_timeout_s: float = 60.0,
    ) -> None:
        self._prefix = f"/{service}/"
        self._guard = guard
        self._enter = enter
        self._leave = leave
        self._report = report
        self._unread = unread
        self._readers = ReaderWatch(slow_reader_timeout_s)
        self._calls = OpenCalls()

    def end_calls(self, error: ParleyError) -> None:
        """Ends every open call, whatever it waits for: its client gets this error, unless it reads nothing."""
        self._calls.end(error)

    async def intercept_service(self, continuation: Continuation, details: grpc.HandlerCallDetails) -> Any:
        """See grpc.aio.ServerInterceptor."""
        handler: Any = await continuation(details)
        if handler is None:
            return None
        method = details.method.removeprefix(self._prefix)
        try:
            # Before the request is read: what a stranger sends is not even decoded.
            _check_metadata(details.invocation_metadata or ())
            if details.method.startswith(_HEALTH_PREFIX):
                return _decodable_only(handler)
            caller = self._guard.check_credentials(details.invocation_metadata)
        except (InvalidRequest, Unauthenticated) as error:
            return self._refusal(method, error)
        if method == details.method:
            return handler
        if handler.response_streaming:
            return handler._replace(unary_stream=self._stream(method, caller, handler.unary_stream))
        # On the wire a stream of one message, and the only kind that tells whether its client reads it.
        unary = self._unary(method, caller, handler.unary_unary)
        return handler._replace(response_streaming=True, unary_unary=None, unary_stream=unary)

    def _refusal(self, method: str, error: ParleyError) -> grpc.RpcMethodHandler[Any, Any]:
        async def refuse(requests: Any, context: Context) -> None:
            call = _new_call(method, None, context, address_identity(context))
            current_call.set(call)
            # Without a load report: how busy we are is nothing to tell a stranger.
            await _abort(context, named_error(call, error), call)

        return grpc.stream_stream_rpc_method_handler(refuse)

    def _unary(
        self, method: str, caller: Caller | None, behaviour: Callable[[Any, Context], Awaitable[Any]]
    ) -> Callable[[Any, Context], Awaitable[None]]:
        async def handle(request: Any, context: Context) -> None:
            async def run(call: Call) -> None:
                response = await behaviour(request, context)
                await _send_headers(context, call)
                await self._readers.write(context, response)

            await self._guarded(method, caller, request, context, run)

        return handle

    def _stream(
        self, method: str, caller: Caller | None, behaviour: Callable[[Any, Context], AsyncGenerator[Any]]
    ) -> Callable[[Any, Context], Awaitable[None]]:
        # A coroutine that calls context.write, not a generator: a cancelled write then raises in here, and the
        # handler's generator is closed at once, not when it is collected.
        async def handle(request: Any, context: Context) -> None:
            async def run(call: Call) -> None:
                is_first = True
                async with aclosing(behaviour(request, context)) as responses:
                    async for response in responses:
                        if is_first:
                            await _send_headers(context, call)
                            is_first = False
                        await self._readers.write(context, response)

            await self._guarded(method, caller, request, context, run)

        return handle

    async def _guarded(
        self,
        method: str,
        caller: Caller | None,
        request: Any,
        context: Context,
        run: Callable[[Call], Awaitable[None]],
    ) -> None:
        caller = caller or self._guard.identify(context)
        call = _new_call(method, request, context, caller.identity)
        call.may_set_priority = caller.rules.priorities
        current_call.set(call)
        try:
            with self._entered(caller, method, request):
                if isinstance(request, Undecodable):
                    raise InvalidRequest([Violation("", NO_MESSAGE)])
                try:
                    with self._calls.entered():
                        await run(call)
                except SlowReader as error:
                    with self._unread():
                        await self._fail(context, error, call)
            context.set_trailing_metadata((self._load_trailer(None),))
            _logger.info("%s OK in %.3f s", method, call.elapsed())
        except grpc.aio.AbortError:
            raise
        except grpc.aio.InternalError as error:
            # The connection broke before gRPC could cancel us: as if it had.
            raise asyncio.CancelledError from error
        except Exception as error:
            await self._fail(context, error, call)

    async def _fail(self, context: Context, error: Exception, call: Call) -> NoReturn:
        named = named_error(call, error)
        await _abort(context, named, call, self._load_trailer(named))

    def _load_trailer(self, error: ParleyError | None) -> tuple[str, bytes]:
        return LOAD_REPORT_KEY, self._report(error)

    @contextmanager
    def _entered(self, caller: Caller, method: str, request: Any) -> Iterator[None]:
        num_bytes = 0 if isinstance(request, Undecodable) else request.ByteSize()
        self._enter(caller.identity, num_bytes)
        try:
            self._guard.enter(caller, method, _num_requests(request))
            try:
                yield
            finally:
                self._guard.leave(caller)
        finally:
            self._leave(caller.identity, num_bytes)


def _num_requests(request: Any) -> int:
    """Of a batch, each request counts; of one that is refused for their number, none does but the call."""
    num_requests = len(getattr(request, "requests", ()))
    return num_requests if 1 <= num_requests <= MAX_BATCH_REQUESTS else 1


def _check_metadata(metadata: Iterable[tuple[str, str | bytes]]) -> None:
    if sum(len(key) + len(value) + _ENTRY_OCTETS for key, value in metadata) > _MAX_METADATA_OCTETS:
        raise InvalidRequest([Violation("", f"metadata may have {_MAX_METADATA_OCTETS:,} octets")])


def _decodable_only(handler: Any) -> Any:
    """The handler of one request, for bytes that are one."""
    kind = "unary_stream" if handler.response_streaming else "unary_unary"
    behaviour = getattr(handler, kind)

    async def handle(request: Any, context: Context) -> Any:
        if isinstance(request, Undecodable):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, NO_MESSAGE)
        return await behaviour(request, context)

    return handler._replace(**{kind: handle})


def _new_call(method: str, request: Any, context: Context, identity: str) -> Call:
    metadata = dict(context.invocation_metadata() or ())
    call = Call(
        method,
        request_id_of(request, metadata.get(REQUEST_ID_KEY, "")),
        identity=identity,
        trace_context={key: value for key in TRACE_CONTEXT_KEYS if isinstance(value := metadata.get(key), str)},
    )
    # At once: gRPC reckons it by the wall clock, which may jump.
    remaining_s = context.time_remaining()
    if remaining_s is not None:
        call.deadline = call.arrived + remaining_s
    return call


def request_id_of(request: Any, incoming: str | bytes = "") -> str:
    """The request's own id, else the incoming one, else a new one; ids that are not valid are passed over."""
    for candidate in (getattr(request, "request_id", ""), incoming):
        if isinstance(candidate, str) and REQUEST_ID_PATTERN.fullmatch(candidate):
            return candidate
    return uuid.uuid4().hex


def named_error(call: Call, error: Exception) -> ParleyError:
    """What a failed call's client is told, after it was logged: an error without a name is a fault of ours."""
    if isinstance(error, ParleyError):
        _log_refusal(call, error)
        named = error
    else:
        _logger.error("%s failed", call.method, exc_info=error)
        call.refusal = Reason.INTERNAL.value
        named = EngineFault("unexpected exception")
    # It leads to what raised the error, and keeps it: the call would be there until garbage is collected.
    error.__traceback__ = None
    return named


async def _send_headers(context: Context, call: Call) -> None:
    # Only now, with the first message: until headers leave, service config and proxies may retry the call.
    await context.send_initial_metadata(((REQUEST_ID_KEY, call.request_id),))


async def _abort(context: Context, error: ParleyError, call: Call, *further_trailers: tuple[str, bytes]) -> NoReturn:
    details = status.to_status(error, call.request_id)
    trailers = (status.DETAILS_KEY, details.SerializeToString()), (REQUEST_ID_KEY, call.request_id)
    try:
        await context.abort(status.code_of(error), details.message, (*trailers, *further_trailers))
    except grpc.aio.InternalError as gone:
        # The call ended before gRPC could cancel us: as if it had.
        raise asyncio.CancelledError from gone


def _log_refusal(call: Call, error: ParleyError) -> None:
    call.refusal = error.reason.value
    level = logging.ERROR if error.reason is Reason.INTERNAL else logging.INFO
    # An invalid request's message may quote what the client sent; the reason alone may not.
    text = error.message if level == logging.ERROR else error.reason.value
    if isinstance(error, Unauthenticated):
        text += f": {error.why}"
    _logger.log(level, "%s %s in %.3f s: %s", call.method, status.code_of(error).name, call.elapsed(), text)
