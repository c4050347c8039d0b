"""OpenTelemetry spans of calls: one for the call, children of the client's; below it queue, prefill and decode."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from parleyd.telemetry.call import Call

_propagator = TraceContextTextMapPropagator()


class Tracing:
    """Makes spans of calls that have ended; `processor` exports them."""

    def __init__(self, processor: SpanProcessor) -> None:
        self._provider = TracerProvider(resource=Resource.create({"service.name": "parley"}))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("parleyd")

    @classmethod
    def to(cls, endpoint: str) -> Tracing:
        """Exports to a collector that speaks OTLP over gRPC, such as http://localhost:4317."""
        return cls(BatchSpanProcessor(OTLPSpanExporter(endpoint)))

    def record(self, call: Call, metadata: Mapping[str, Any], code: str) -> None:
        """The spans of a call that ends now. `metadata` may hold the client's W3C trace context."""
        carrier = {key: value for key, value in metadata.items() if key in ("traceparent", "tracestate")}
        start = time.time_ns() - int(call.elapsed() * 1e9)
        span = self._tracer.start_span(
            f"parley.v1.ChatService/{call.method}",
            context=_propagator.extract(carrier),
            kind=SpanKind.SERVER,
            start_time=start,
            attributes={
                "rpc.system": "grpc",
                "rpc.method": call.method,
                "rpc.grpc.status": code,
                "parley.request_id": call.request_id,
            },
        )
        if code not in ("OK", "CANCELLED"):
            span.set_status(Status(StatusCode.ERROR, code))
        context = trace.set_span_in_context(span)
        begin_s = 0.0
        for name, end_s in (("queue", call.queue_s), ("prefill", call.first_token_s), ("decode", call.elapsed())):
            if end_s is None:
                break
            child = self._tracer.start_span(name, context=context, start_time=start + int(begin_s * 1e9))
            child.end(start + int(end_s * 1e9))
            begin_s = end_s
        span.end()

    def close(self) -> None:
        """Exports what is left."""
        self._provider.shutdown()
