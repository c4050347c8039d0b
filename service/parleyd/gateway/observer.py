"""Where a replica's measurements come together: metrics, spans, load reports."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from parleyd.errors import StartupError
from parleyd.rpc.load_report import OrcaLoadReport
from parleyd.telemetry.call import Call, current_call
from parleyd.telemetry.metrics import Load, Metrics

if TYPE_CHECKING:
    from parleyd.telemetry.tracing import Tracing


class Observer:
    """Is told of each call that has ended."""

    def __init__(self, load: Callable[[], Load], otlp_endpoint: str | None = None) -> None:
        """Raises StartupError where spans are to go to `otlp_endpoint` and OpenTelemetry is not installed."""
        self.metrics = Metrics(load)
        self._load = load
        self._tracing = _tracing_to(otlp_endpoint) if otlp_endpoint else None
        self._answers = _Rate()
        self._errors = _Rate()

    def call_ended(self, method: str, metadata: Mapping[str, Any], code: str) -> None:
        """Runs in the task that served the call."""
        self.metrics.calls.labels(method, code).inc()
        if code not in ("OK", "CANCELLED"):
            self._errors.count()
        if call := current_call.get(None):
            self.metrics.call_seconds.labels(method).observe(call.elapsed())
            if call.refusal:
                self.metrics.refusals.labels(call.refusal).inc()
            if self._tracing:
                self._tracing.record(call, metadata, code)

    def item_ended(self, call: Call, code: str) -> None:
        """An item of a batch has; the batch itself follows as a call."""
        self.metrics.batch_items.labels(code).inc()
        if call.refusal:
            self.metrics.refusals.labels(call.refusal).inc()

    def load_report(self) -> bytes:
        """A serialised ORCA report for the answer that is ready now; balancers weigh replicas by it."""
        load = self._load()
        self._answers.count()
        report = OrcaLoadReport(
            # At least the answer that the report goes with: a utilisation of 0 would mean that it is not known.
            application_utilization=max(load.utilisation, 1 / load.max_running),
            mem_utilization=load.kv_cache_usage,
            rps_fractional=self._answers.per_second(),
            eps=self._errors.per_second(),
            named_metrics={"queue_depth": load.num_waiting, "kv_cache_usage": load.kv_cache_usage},
        )
        serialised: bytes = report.SerializeToString()
        return serialised

    def close(self) -> None:
        """Exports what is left."""
        if self._tracing:
            self._tracing.close()


def _tracing_to(endpoint: str) -> Tracing:
    try:
        from parleyd.telemetry.tracing import Tracing
    except ModuleNotFoundError as error:
        raise StartupError(f"--otlp-endpoint: module {error.name} is missing: install parley[tracing]") from error
    return Tracing.to(endpoint)


class _Rate:
    """Events per second, those of the last seconds above all."""

    _SPAN_S = 10.0

    def __init__(self) -> None:
        self._value = 0.0
        self._time = time.monotonic()

    def count(self) -> None:
        self._value = self.per_second() + 1 / self._SPAN_S

    def per_second(self) -> float:
        now = time.monotonic()
        self._value *= math.exp((self._time - now) / self._SPAN_S)
        self._time = now
        return self._value
