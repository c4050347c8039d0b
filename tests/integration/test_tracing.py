"""OpenTelemetry spans of calls and of the items of batches."""

from __future__ import annotations

import threading
import time

import grpc
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from parley.v1 import chat_pb2
from parleyd.telemetry import tracing
from parleyd.telemetry.tracing import Tracing
from tests.integration.conftest import StartGateway
from tests.support.eventually import eventually
from tests.support.gateway import GatewayThread
from tests.support.requests import ask

TRACE_ID, PARENT_ID = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331
IN_TRACE = (("traceparent", f"00-{TRACE_ID:032x}-{PARENT_ID:016x}-01"), ("tracestate", "vendor=1"))
STAGES = ["queue", "prefill", "decode"]
FOREVER = ask("!forever", max_new_tokens=4000)


class Spans:
    """What a gateway exports."""

    def __init__(self, gateway: GatewayThread) -> None:
        self._exporter = InMemorySpanExporter()
        gateway.gateway.observer._tracing = Tracing(SimpleSpanProcessor(self._exporter))

    def call(self, method: str) -> ReadableSpan:
        """The one call's; it is made after the client has its status."""
        deadline = time.monotonic() + 10
        while True:
            found = [each for each in self.all() if each.name == f"parley.v1.ChatService/{method}"]
            if found or time.monotonic() > deadline:
                (span,) = found
                return span
            time.sleep(0.01)

    def all(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def below(self, span: ReadableSpan) -> list[ReadableSpan]:
        """Its children, by when they began; each within it, and in its trace."""
        children = [each for each in self.all() if each.parent and each.parent.span_id == span.context.span_id]
        for child in children:
            assert child.context.trace_id == span.context.trace_id
            assert span.start_time <= child.start_time <= child.end_time <= span.end_time
        return sorted(children, key=lambda child: (child.start_time, child.end_time))

    def items(self) -> dict[int, ReadableSpan]:
        """Those of the one batch, by index."""
        found = {item.attributes["parley.batch_index"]: item for item in self.below(self.call("GenerateBatch"))}
        assert all(item.name == "item" for item in found.values())
        assert len(found) == sum(span.name == "item" for span in self.all())
        return found


@pytest.fixture
def traced(start_gateway: StartGateway) -> GatewayThread:
    return start_gateway(worker=("--step-delay", "0.002"), max_running=2)


@pytest.fixture
def spans(traced: GatewayThread) -> Spans:
    return Spans(traced)


def batch(*requests: chat_pb2.GenerateRequest) -> chat_pb2.GenerateBatchRequest:
    return chat_pb2.GenerateBatchRequest(requests=requests)


def code_of(span: ReadableSpan) -> object:
    return span.attributes["rpc.grpc.status"]


def names(spans: list[ReadableSpan]) -> list[str]:
    return [span.name for span in spans]


def assert_in_turn(stages: list[ReadableSpan], of: ReadableSpan) -> None:
    """Each stage begins where the one before it ended, from the beginning to the end of what they are of."""
    times = [time for stage in stages for time in (stage.start_time, stage.end_time)]
    assert [of.start_time, *times[1:-1:2], of.end_time] == [*times[::2], times[-1]]


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
def test_a_call_makes_spans_in_its_clients_trace(traced: GatewayThread, spans: Spans, method: str) -> None:
    answer = getattr(traced.stub, method)(ask("hello"), timeout=10, metadata=IN_TRACE)
    if method == "GenerateStream":
        list(answer)
    call = spans.call(method)
    assert call.context.trace_id == TRACE_ID and call.parent is not None and call.parent.span_id == PARENT_ID
    assert (call.kind, call.context.trace_state.to_header()) == (SpanKind.SERVER, "vendor=1")
    assert call.resource.attributes["service.name"] == "parley"
    assert {"rpc.system": "grpc", "rpc.method": method}.items() <= call.attributes.items()
    stages = spans.below(call)
    assert names(stages) == STAGES
    assert_in_turn(stages, call)
    assert len(spans.all()) == 4


def test_a_refused_call_makes_a_span_with_its_code(traced: GatewayThread, spans: Spans) -> None:
    with pytest.raises(grpc.RpcError):
        traced.stub.Generate(ask("x", temperature=-1.0), timeout=10)
    span = spans.call("Generate")
    assert code_of(span) == "INVALID_ARGUMENT" and not span.status.is_ok
    assert spans.all() == [span]


def test_a_call_that_ends_amid_its_prefill_has_that_stage(traced: GatewayThread, spans: Spans) -> None:
    call = traced.stub.GenerateStream(ask("!wait"))
    eventually(lambda: traced.gateway.worker.num_open == 1)
    call.cancel()
    span = spans.call("GenerateStream")
    assert code_of(span) == "CANCELLED" and span.status.is_ok  # what a client does itself is no error
    assert names(spans.below(span)) == ["queue", "prefill"]
    assert_in_turn(spans.below(span), span)


def test_each_item_of_a_batch_has_spans_below_the_batchs(traced: GatewayThread, spans: Spans) -> None:
    requests = [ask(f"item {i}", request_id=f"r{i}") for i in range(6)]
    list(traced.stub.GenerateBatch(batch(*requests), timeout=10, metadata=IN_TRACE))
    call = spans.call("GenerateBatch")
    assert call.context.trace_id == TRACE_ID and call.parent is not None and call.parent.span_id == PARENT_ID
    items = spans.items()
    assert sorted(items) == list(range(6))
    for i, item in items.items():
        assert item.attributes["parley.request_id"] == f"r{i}" and code_of(item) == "OK"
        assert item.start_time == call.start_time  # each has waited from there on
        assert names(spans.below(item)) == STAGES
        assert_in_turn(spans.below(item), item)
    assert len(spans.all()) == 1 + 6 * 4


def test_an_item_that_fails_has_its_span_with_the_code(traced: GatewayThread, spans: Spans) -> None:
    list(traced.stub.GenerateBatch(batch(ask("x", temperature=99), ask("!fail"), ask("good")), timeout=10))
    items = spans.items()
    assert [code_of(items[i]) for i in range(3)] == ["INVALID_ARGUMENT", "INTERNAL", "OK"]
    assert [items[i].status.is_ok for i in range(2)] == [False, False]
    assert [names(spans.below(items[i])) for i in range(3)] == [[], STAGES, STAGES]
    assert code_of(spans.call("GenerateBatch")) == "OK"


def test_items_of_a_cancelled_batch_end_their_spans_before_it(traced: GatewayThread, spans: Spans) -> None:
    call = traced.stub.GenerateBatch(batch(ask("short"), FOREVER, ask("!wait"), ask("queued")))
    assert next(call).index == 0
    eventually(lambda: traced.gateway.worker.num_open == 2 and traced.gateway.admission.num_waiting == 1)
    call.cancel()
    assert code_of(spans.call("GenerateBatch")) == "CANCELLED"
    items = spans.items()
    assert [code_of(items[i]) for i in range(4)] == ["OK", "CANCELLED", "CANCELLED", "CANCELLED"]
    assert [names(spans.below(items[i])) for i in range(4)] == [STAGES, STAGES, ["queue", "prefill"], []]


def test_items_of_a_batch_whose_deadline_passes_say_so(traced: GatewayThread, spans: Spans) -> None:
    with pytest.raises(grpc.RpcError):
        list(traced.stub.GenerateBatch(batch(FOREVER), timeout=1.001))  # gRPC tells the server 1.01 s
    assert code_of(spans.items()[0]) == code_of(spans.call("GenerateBatch")) == "DEADLINE_EXCEEDED"


def test_a_batch_that_is_refused_has_one_span(traced: GatewayThread, spans: Spans) -> None:
    with pytest.raises(grpc.RpcError):
        list(traced.stub.GenerateBatch(batch(), timeout=10))
    assert code_of(spans.call("GenerateBatch")) == "INVALID_ARGUMENT"
    assert len(spans.all()) == 1


def test_a_collector_that_takes_nothing_does_not_keep_the_service_from_ending(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given_up = threading.Event()

    class Stuck(InMemorySpanExporter):
        def shutdown(self) -> None:
            given_up.wait(60)

    monkeypatch.setattr(tracing, "_LAST_EXPORT_S", 0.1)
    Tracing(SimpleSpanProcessor(Stuck())).close()
    given_up.set()
    assert "the collector did not take the last spans" in caplog.text


def test_a_service_that_can_have_no_thread_ends_without_its_last_spans(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    tracing_to_nobody = Tracing(SimpleSpanProcessor(InMemorySpanExporter()))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        tracing_to_nobody.close()
    assert "the last spans are lost: can't start new thread" in caplog.text
