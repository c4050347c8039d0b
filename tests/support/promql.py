"""Whether PromQL asks for what a server shows: metrics that there are, labels that they have, rates of counters.

It knows the part of PromQL that our queries use, and refuses the rest rather than let it pass.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import promql_parser
from prometheus_client.parser import text_string_to_metric_families

# Prometheus adds these to what it scrapes.
OF_SCRAPE = frozenset({"instance", "job"})

_OF_COUNTERS = {"increase", "irate", "rate", "resets"}
_MERGING = {"avg", "count", "group", "max", "min", "stddev", "stdvar", "sum"}
_ARITHMETIC = {"+", "-", "*", "/", "%", "^"}


class QueryError(Exception):
    """A query that can show nothing, or something wrong."""


class Scrape:
    """What `/metrics` has shown."""

    def __init__(self, text: str) -> None:
        self._series: dict[str, list[dict[str, str]]] = {}
        self._counters: set[str] = set()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self._series.setdefault(sample.name, []).append(sample.labels)
                if family.type == "histogram" or (family.type == "counter" and sample.name.endswith("_total")):
                    self._counters.add(sample.name)

    def labels_of(self, query: str) -> frozenset[str]:
        """The labels that the result of a query has. Raises QueryError, and ValueError for what is no PromQL."""
        return self._labels(promql_parser.parse(query))

    def _labels(self, node: Any) -> frozenset[str]:
        match node:
            case promql_parser.NumberLiteral():
                return frozenset()
            case promql_parser.ParenExpr():
                return self._labels(node.expr)
            case promql_parser.VectorSelector():
                return self._selected(node, as_counter=False)
            case promql_parser.AggregateExpr():
                return self._aggregated(node)
            case promql_parser.Call():
                return self._called(node)
            case promql_parser.BinaryExpr():
                return self._combined(node)
        raise QueryError(f"{node} is not known to this check")

    def _selected(self, selector: promql_parser.VectorSelector, *, as_counter: bool) -> frozenset[str]:
        if selector.name not in self._series:
            raise QueryError(f"there is no metric {selector.name}")
        if as_counter != (selector.name in self._counters):
            raise QueryError(f"{selector.name} is {'no' if as_counter else 'a'} counter")
        series = self._series[selector.name]
        labels = frozenset.intersection(*map(frozenset, series)) | OF_SCRAPE
        matchers = selector.matchers.matchers
        _demand({matcher.name for matcher in matchers}, labels, str(selector))
        if selector.matchers.or_matchers:
            raise QueryError(f"`or` in {selector} is not known to this check")
        if not any(all(_matches(matcher, of_one) for matcher in matchers) for of_one in series):
            raise QueryError(f"{selector} selects nothing")
        return labels

    def _aggregated(self, node: promql_parser.AggregateExpr) -> frozenset[str]:
        if str(node.op) not in _MERGING:
            raise QueryError(f"{node.op} is not known to this check")
        labels = self._labels(node.expr)
        if node.modifier is None:
            return frozenset()
        named = frozenset(node.modifier.labels)
        _demand(named, labels, str(node))
        return named if node.modifier.type == promql_parser.AggModifierType.By else labels - named

    def _called(self, node: promql_parser.Call) -> frozenset[str]:
        if node.func.name in _OF_COUNTERS:
            (matrix,) = node.args
            if not isinstance(matrix, promql_parser.MatrixSelector):
                raise QueryError(f"{matrix} is not known to this check")
            return self._selected(matrix.vector_selector, as_counter=True)
        if node.func.name == "histogram_quantile":
            _, buckets = node.args
            labels = self._labels(buckets)
            _demand({"le"}, labels, str(node))
            return labels - {"le"}
        raise QueryError(f"{node.func.name} is not known to this check")

    def _combined(self, node: promql_parser.BinaryExpr) -> frozenset[str]:
        """Series of both sides meet whose labels are all the same; a number meets all."""
        modifier = node.modifier
        if str(node.op) not in _ARITHMETIC or (modifier and (modifier.matching or modifier.group_labels)):
            raise QueryError(f"{node} is not known to this check")
        sides: Sequence[Any] = [
            side for side in (node.lhs, node.rhs) if not isinstance(side, promql_parser.NumberLiteral)
        ]
        labels = [self._labels(side) for side in sides]
        if len(set(labels)) > 1:
            raise QueryError(f"the sides of {node} have different labels, so none of their series meet")
        return labels[0] if labels else frozenset()


def _demand(named: set[str] | frozenset[str], labels: frozenset[str], where: str) -> None:
    if unknown := named - labels:
        raise QueryError(f"no label {', '.join(sorted(unknown))} in {where}: there are {sorted(labels)}")


def _matches(matcher: promql_parser.Matcher, labels: dict[str, str]) -> bool:
    if matcher.name in OF_SCRAPE:
        return True
    value = labels[matcher.name]
    match matcher.op:
        case promql_parser.MatchOp.Equal:
            return value == matcher.value
        case promql_parser.MatchOp.NotEqual:
            return value != matcher.value
        case promql_parser.MatchOp.Re:
            return re.fullmatch(matcher.value, value) is not None
    return re.fullmatch(matcher.value, value) is None
