"""Prometheus metrics of one replica. The gateway feeds them; the admin port shows them.

Latencies bear the names of OpenTelemetry's conventions for generative AI servers, the load also those that inference
gateways scrape (the model server protocol of the Gateway API inference extension, whose defaults are vLLM's names).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from parleyd.generation import EngineStats

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
_REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class Load:
    """A replica's state at one moment; totals count since the start."""

    model: str
    num_open_calls: int
    num_waiting: int  # for a slot
    num_running: int  # holding one
    max_running: int
    is_serving: bool
    num_worker_restarts: int
    num_handed_over: int
    engine: EngineStats

    @property
    def kv_cache_usage(self) -> float:
        """The share of KV blocks that requests hold."""
        return self.engine.num_used_blocks / self.engine.num_blocks if self.engine.num_blocks else 0.0

    @property
    def utilisation(self) -> float:
        """Requests that run or wait, for each that could run: above 1, there is a queue."""
        return (self.num_running + self.num_waiting) / self.max_running


class Metrics:
    """Counters and histograms, and what `load` tells when it is asked."""

    def __init__(self, load: Callable[[], Load]) -> None:
        # `/metrics?name[]=…` would else leave out what tells its names only in a scrape, such as the load.
        self.registry = registry = CollectorRegistry(support_collectors_without_names=True)
        self.calls = Counter("parley_requests", "Calls that ended.", ("method", "code"), registry=registry)
        self.refusals = Counter(
            "parley_rejected_requests", "Calls and items of batches refused or failed.", ("reason",), registry=registry
        )
        self.batch_items = Counter("parley_batch_items", "Items of batches that ended.", ("code",), registry=registry)
        self.resumed = Counter("parley_resumed_streams", "Answers continued for a client's resume.", registry=registry)
        self.call_seconds = _seconds("gen_ai_server_request_duration", "Calls, from arrival.", registry, ("method",))
        self.queue_seconds = _seconds("parley_queue_time", "From arrival to the engine.", registry)
        self.first_token_seconds = _seconds("gen_ai_server_time_to_first_token", "From arrival.", registry)
        self.token_seconds = _seconds("gen_ai_server_time_per_output_token", "Between an answer's tokens.", registry)
        self.prompt_tokens = _histogram("parley_request_prompt_tokens", "Tokens of a prompt.", registry, _TOKENS)
        self.batch_size = _histogram("parley_batch_size", "Requests that a step made tokens for.", registry, _REQUESTS)
        registry.register(_LoadCollector(load))
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)


class _LoadCollector(Collector):
    """The replica's load at the moment of a scrape."""

    def __init__(self, load: Callable[[], Load]) -> None:
        self._load = load

    def collect(self) -> Iterable[Metric]:
        load = self._load()
        engine = load.engine
        yield GaugeMetricFamily("parley_serving", "1 while requests are accepted.", load.is_serving)
        yield GaugeMetricFamily("parley_open_calls", "Calls that are open.", load.num_open_calls)
        yield GaugeMetricFamily("parley_queue_depth", "Requests that wait for a slot.", load.num_waiting)
        yield GaugeMetricFamily("parley_running_requests", "Requests that hold a slot.", load.num_running)
        yield GaugeMetricFamily("parley_max_running_requests", "Slots.", load.max_running)
        yield GaugeMetricFamily("parley_kv_cache_usage_ratio", "Share of KV blocks in use.", load.kv_cache_usage)
        yield CounterMetricFamily("parley_prompt_tokens", "Prompt tokens admitted.", engine.num_prompt_tokens)
        yield CounterMetricFamily("parley_cached_prompt_tokens", "Found in the cache.", engine.num_cached_prompt_tokens)
        yield CounterMetricFamily("parley_generated_tokens", "Tokens generated.", engine.num_generated_tokens)
        yield CounterMetricFamily("parley_preemptions", "Requests whose blocks were taken.", engine.num_preemptions)
        yield CounterMetricFamily("parley_worker_restarts", "Workers replaced.", load.num_worker_restarts)
        yield CounterMetricFamily("parley_handed_over_streams", "Given to a new worker.", load.num_handed_over)
        for name, text, value in (
            ("num_requests_waiting", "Requests that wait.", load.num_waiting),
            ("num_requests_running", "Requests that run.", load.num_running),
            ("kv_cache_usage_perc", "Share of KV blocks in use.", load.kv_cache_usage),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=("model_name",))
            gauge.add_metric((load.model,), value)
            yield gauge


def _seconds(name: str, text: str, registry: CollectorRegistry, labels: tuple[str, ...] = ()) -> Histogram:
    return Histogram(name, text, labels, unit="seconds", buckets=_SECONDS, registry=registry)


def _histogram(name: str, text: str, registry: CollectorRegistry, buckets: tuple[int, ...]) -> Histogram:
    return Histogram(name, text, buckets=buckets, registry=registry)
