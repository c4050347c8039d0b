"""Where a replica's measurements come together: metrics, spans, load reports."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from parleyd.errors import (
    ClientLimit,
    DeadlineExceeded,
    Draining,
    EngineFault,
    NotReady,
    ParleyError,
    QueueFull,
    StartupError,
    WorkerLost,
)
from parleyd.rpc.load_report import OrcaLoadReport
from parleyd.telemetry.call import Call, current_call
from parleyd.telemetry.metrics import Load, Metrics

if TYPE_CHECKING:
    from parleyd.telemetry.tracing import Tracing

# What another replica might have spared the client, and so what a balancer should send fewer calls here for: bugs of
# ours, a model that is not there, no room, and deadlines that the queue here makes impossible. Not what would be the
# same anywhere (invalid requests, credentials), and not what clients do themselves: cancel, give too little time for a
# whole answer, read nothing, or reach a limit of their own, although that is RESOURCE_EXHAUSTED as well.
_FAULTS_HERE = (EngineFault, WorkerLost, NotReady, Draining, QueueFull, DeadlineExceeded)


class Observer:
    """Is told of each call that has ended."""

    def __init__(self, load: Callable[[], Load], otlp_endpoint: str | None = None) -> None:
        """Raises StartupError where spans are to go to `otlp_endpoint` and OpenTelemetry is not installed."""
        self.metrics = Metrics(load)
        self._load = load
        self._tracing = _tracing_to(otlp_endpoint) if otlp_endpoint else None
        self._answers = _Rate()
        self._errors = _Rate()

    def call_ended(self, method: str, code: str) -> None:
        """Runs in the task that served the call."""
        self.metrics.calls.labels(method, code).inc()
        if call := current_call.get(None):
            self.metrics.call_seconds.labels(method).observe(call.elapsed())
            if call.refusal:
                self.metrics.refusals.labels(call.refusal).inc()
            if self._tracing:
                self._tracing.call_ended(call, code)

    def item_ended(self, call: Call, code: str) -> None:
        """An item of a batch has; the batch itself follows as a call."""
        self.metrics.batch_items.labels(code).inc()
        if call.refusal:
            self.metrics.refusals.labels(call.refusal).inc()
        if self._tracing:
            self._tracing.item_ended(call, code)

    def load_report(self, error: ParleyError | None) -> bytes:
        """A serialised ORCA report to go with the status of a call, which is counted in it: an answer, or `error`.

        Balancers weigh replicas by it: answers per second ÷ (utilisation + errors per answer).
        """
        if error is None:
            self._answers.count()
        elif isinstance(error, _FAULTS_HERE) and not isinstance(error, ClientLimit):
            self._errors.count()
        load = self._load()
        report = OrcaLoadReport(
            # At least one call, and one answer in a while, even if there was none: 0 would mean that it is not known,
            # and balancers pass over the report, also that of a replica that refuses everything.
            application_utilization=max(load.utilisation, 1 / load.max_running),
            mem_utilization=load.kv_cache_usage,
            rps_fractional=max(self._answers.per_second(), _Rate.LEAST),
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
    if not endpoint.startswith(("http://", "https://")):  # the exporter would take it for a host that speaks TLS
        raise StartupError(f"--otlp-endpoint {endpoint}: must begin with http:// or https://")
    try:
        from parleyd.telemetry.tracing import Tracing
    except ModuleNotFoundError as error:
        raise StartupError(
            f"--otlp-endpoint: module {error.name} is missing: run `pip install '.[tracing]'` in Parley's folder"
        ) from error
    try:
        return Tracing.to(endpoint)
    except ValueError as error:
        raise StartupError(f"--otlp-endpoint {endpoint}: {error}") from error


class _Rate:
    """Events per second, those of the last seconds above all."""

    _SPAN_S = 10.0
    LEAST = 1 / _SPAN_S  # of one event, just now

    def __init__(self) -> None:
        self._value = 0.0
        self._time = time.monotonic()

    def count(self) -> None:
        self._value = self.per_second() + self.LEAST

    def per_second(self) -> float:
        now = time.monotonic()
        self._value *= math.exp((self._time - now) / self._SPAN_S)
        self._time = now
        return self._value
