"""OpenTelemetry spans: one for each call, a child of its client's; below it queue, prefill and decode.

Below a batch's, one for each item; below that, the item's queue, prefill and decode.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from parleyd.telemetry.call import Call

_propagator = TraceContextTextMapPropagator()
_logger = logging.getLogger(__name__)

# The SDK would give a collector that takes nothing half a minute, in which whoever stopped the service may kill it.
_LAST_EXPORT_S = 5.0


class Tracing:
    """Makes spans of what has ended; `processor` exports them."""

    def __init__(self, processor: SpanProcessor) -> None:
        self._provider = TracerProvider(resource=Resource.create({"service.name": "parley"}), shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("parleyd")

    @classmethod
    def to(cls, endpoint: str) -> Tracing:
        """Exports to a collector that speaks OTLP over gRPC, such as http://localhost:4317."""
        return cls(BatchSpanProcessor(OTLPSpanExporter(endpoint)))

    def call_ended(self, call: Call, code: str) -> None:
        """The spans of a call that ends now."""
        self._end(self._span_of(call), call, code)

    def item_ended(self, item: Call, code: str) -> None:
        """The spans of a batch's item that ends now, below the span of the batch."""
        assert item.batch is not None
        context = trace.set_span_in_context(self._span_of(item.batch))
        span = self._tracer.start_span(
            "item", context=context, start_time=item.arrived_ns, attributes={"parley.batch_index": item.index}
        )
        self._end(span, item, code)

    def _span_of(self, call: Call) -> Span:
        """Begun when first asked for. A batch's is as its first item ends: spans name their parents."""
        if call.span is None:
            call.span = self._tracer.start_span(
                f"parley.v1.ChatService/{call.method}",
                context=_propagator.extract(call.trace_context),
                kind=SpanKind.SERVER,
                start_time=call.arrived_ns,
                attributes={"rpc.system": "grpc", "rpc.method": call.method},
            )
        return call.span

    def _end(self, span: Span, call: Call, code: str) -> None:
        span.set_attributes({"rpc.grpc.status": code, "parley.request_id": call.request_id})
        if code not in ("OK", "CANCELLED"):
            span.set_status(Status(StatusCode.ERROR, code))
        context = trace.set_span_in_context(span)
        end_s = call.elapsed()
        for name, begin_s, stage_end_s in _stages(call, end_s):
            stage = self._tracer.start_span(name, context=context, start_time=_wall_ns(call, begin_s))
            stage.end(_wall_ns(call, stage_end_s))
        span.end(_wall_ns(call, end_s))

    def close(self) -> None:
        """Exports what is left, as far as the collector takes it within some seconds."""
        last_export = threading.Thread(target=self._provider.shutdown, name="last-export", daemon=True)
        try:
            last_export.start()
        except RuntimeError as error:  # no thread can be had
            _logger.warning("the last spans are lost: %s", error)
            return
        last_export.join(_LAST_EXPORT_S)
        if last_export.is_alive():
            _logger.warning("the collector did not take the last spans within %g s: they are lost", _LAST_EXPORT_S)


def _stages(call: Call, end_s: float) -> Iterator[tuple[str, float, float]]:
    """Name, begin and end of each stage, in seconds from arrival: none of a call that never came to the engine."""
    if call.queue_s is None:
        return
    yield "queue", 0.0, call.queue_s
    yield "prefill", call.queue_s, end_s if call.first_token_s is None else call.first_token_s
    if call.first_token_s is not None:
        yield "decode", call.first_token_s, end_s


def _wall_ns(call: Call, seconds: float) -> int:
    return call.arrived_ns + int(seconds * 1e9)
