"""deploy/grafana/parley.json against the metrics of a service that has met with everything."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from parley.v1 import chat_pb2
from tests.support.gateway import GatewayThread, scripted_command, scripted_settings
from tests.support.promql import QueryError, Scrape
from tests.support.requests import ask

DASHBOARD = Path(__file__).parents[2] / "deploy/grafana/parley.json"
DEFINED_BY_GRAFANA = {"__rate_interval"}

PAGE: dict[str, Any] = json.loads(DASHBOARD.read_text())
TARGETS = [(f"{panel['title']}, {target['refId']}", target) for panel in PAGE["panels"] for target in panel["targets"]]


@pytest.fixture(scope="module")
def scrape(tokenizer_folder: Path) -> Scrape:
    """What Prometheus reads after answers, streams, batches, errors, refusals and the death of a worker."""
    settings = scripted_settings(max_running=1, max_queue=0, admin_port=0)
    with GatewayThread(settings, scripted_command(tokenizer_folder)) as gateway:
        gateway.stub.Generate(ask("hello"), timeout=10)
        list(gateway.stub.GenerateStream(ask("!die-at 5 0123456789"), timeout=20))
        items = [ask("a"), ask("b", temperature=99)]
        list(gateway.stub.GenerateBatch(chat_pb2.GenerateBatchRequest(requests=items), timeout=10))
        refuse_one(gateway)
        with urllib.request.urlopen(f"http://{gateway.admin}/metrics", timeout=10) as response:
            return Scrape(response.read().decode())


def refuse_one(gateway: GatewayThread) -> None:
    """Asks for more than there is room for."""
    held = gateway.stub.GenerateStream(ask("!forever", max_new_tokens=4000))
    next(held)
    with pytest.raises(grpc.RpcError):
        gateway.stub.Generate(ask("x"), timeout=10)
    held.cancel()
    gateway.wait_idle()


def check(target: dict[str, str], scrape: Scrape) -> None:
    """Raises QueryError if the query asks for what there is not, or the legend does not tell its series apart."""
    labels = scrape.labels_of(target["expr"].replace("$__rate_interval", "5m"))
    shown = set(re.findall(r"{{\s*(\w+)\s*}}", target["legendFormat"]))
    if shown != labels - {"job"}:
        raise QueryError(f"the legend shows {sorted(shown)} of {sorted(labels)}")


def test_every_query_and_legend_of_the_dashboard_is_of_metrics_and_labels_that_there_are(scrape: Scrape) -> None:
    wrong = []
    for name, target in TARGETS:
        try:
            check(target, scrape)
        except (QueryError, ValueError) as error:
            wrong.append(f"{name}: {error}")
    assert len(TARGETS) >= 25
    assert not wrong, "\n".join(wrong)


def test_every_variable_of_the_dashboard_is_defined() -> None:
    variables = {variable["name"]: variable["type"] for variable in PAGE["templating"]["list"]}
    # Those of other types ask for metrics and labels themselves, which would have to be checked.
    assert set(variables.values()) == {"datasource"}
    used = {name for text in texts(PAGE) for name in re.findall(r"\$\{?(\w+)", text)}
    assert used - DEFINED_BY_GRAFANA == set(variables)
    assert all(panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"} for panel in PAGE["panels"])


def texts(value: Any) -> Iterator[str]:
    """All strings in a JSON value."""
    match value:
        case str():
            yield value
        case list() | dict():
            for part in value.values() if isinstance(value, dict) else value:
                yield from texts(part)


@pytest.mark.parametrize(
    ("query", "legend", "mistake"),
    [
        ("sum(rate(parley_request_total[$__rate_interval]))", "", "no metric parley_request_total"),
        ('sum(rate(parley_requests_total{status="OK"}[5m]))', "", "no label status"),
        ('sum(rate(parley_requests_total{code="Ok"}[5m]))', "", "selects nothing"),
        ('sum(rate(parley_requests_total{code!~"OK|[A-Z_]+"}[5m]))', "", "selects nothing"),
        ("sum by (grpc_code) (rate(parley_requests_total[5m]))", "{{grpc_code}}", "no label grpc_code"),
        ("sum without (grpc_code) (rate(parley_requests_total[5m]))", "{{code}}", "no label grpc_code"),
        ("sum by (code) (rate(parley_requests_total[5m]))", "{{method}}", "legend"),
        ("sum by (method, code) (rate(parley_requests_total[5m]))", "{{code}}", "legend"),
        ("sum(rate(parley_requests_total[5m]))", "{{code}}", "legend"),
        ("histogram_quantile(0.5, sum(rate(parley_queue_time_seconds_bucket[5m])))", "", "no label le"),
        ("histogram_quantile(0.5, sum by (le) (rate(parley_queue_time_seconds_count[5m])))", "", "no label le"),
        ("sum(rate(parley_queue_depth[5m]))", "", "no counter"),
        ("sum(parley_requests_total)", "", "a counter"),
        ("sum by (code) (rate(parley_requests_total[5m])) / sum(parley_serving)", "{{code}}", "different labels"),
        ("sum(rate(parley_requests_total[$interval]))", "", "unexpected character"),
    ],
)
def test_mistakes_in_a_dashboard_are_found(scrape: Scrape, query: str, legend: str, mistake: str) -> None:
    with pytest.raises((QueryError, ValueError), match=mistake):
        check({"expr": query, "legendFormat": legend}, scrape)


@pytest.mark.parametrize(
    ("query", "legend"),
    [
        ('sum by (code) (rate(parley_requests_total{code=~"OK|RES.*",method!="x"}[$__rate_interval]))', "{{code}}"),
        ("sum without (method, instance) (rate(parley_requests_total[5m])) * 60", "{{ code }}"),
        ('(parley_serving{instance="a:1"} - parley_queue_depth)', "{{instance}}"),
    ],
)
def test_queries_that_are_right_are_left_alone(scrape: Scrape, query: str, legend: str) -> None:
    check({"expr": query, "legendFormat": legend}, scrape)
