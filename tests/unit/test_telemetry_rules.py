"""The dashboard and the alerts are PromQL, and name nothing that kvmem does not tell."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmem import telemetry
from kvmem.explain.misses.reasons import NAMES
from kvmem.telemetry.metrics import METRICS

promql = pytest.importorskip("promql_parser")
yaml = pytest.importorskip("yaml")

FOLDER = Path(telemetry.__file__).parent
OURS = {"model_name", "engine", "le"}
RANGE = "$__rate_interval"


def dashboard() -> list[tuple[str, str]]:
    told = json.loads((FOLDER / "grafana.json").read_text())
    found = [
        (panel["title"], target["expr"])
        for panel in told["panels"]
        for target in panel.get("targets", ())
    ]
    assert len(found) > 20
    return found


def alerts() -> list[tuple[str, str]]:
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    found = [(rule["alert"], rule["expr"]) for group in groups for rule in group["rules"]]
    assert len(found) > 8
    return found


def selectors(expr: Any) -> Iterator[Any]:
    """Every vector selector in a parsed expression."""
    if isinstance(expr, promql.VectorSelector):
        yield expr
        return
    for name in ("expr", "lhs", "rhs", "vector_selector", "vs", "param"):
        inside = getattr(expr, name, None)
        if inside is not None and not isinstance(inside, str | int | float):
            yield from selectors(inside)
    for inside in getattr(expr, "args", None) or ():
        yield from selectors(inside)


def series() -> dict[str, set[str]]:
    """The names that Prometheus stores, and their labels."""
    found = {}
    for one in METRICS:
        ends = ("_bucket", "_sum", "_count") if one.kind == "histogram" else ("",)
        for end in ends:
            found[one.name + end] = {*one.labels, *OURS}
    return found


def faults(text: str) -> list[str]:
    """What an expression has that is not kvmem's."""
    parsed = promql.parse(text.replace(RANGE, "5m"))
    found = list(selectors(parsed))
    known = series()
    wrong = [] if found else ["no metric"]
    for one in found:
        if one.name not in known:
            wrong.append(f"metric {one.name}")
            continue
        labels = {matcher.name for matcher in one.matchers.matchers}
        wrong += [f"label {label} of {one.name}" for label in labels - known[one.name]]
    return wrong


@pytest.mark.parametrize(("name", "expr"), [*dashboard(), *alerts()])
def test_an_expression_parses_and_names_metrics_and_labels_that_exist(name: str, expr: str) -> None:
    assert faults(expr) == []


@pytest.mark.parametrize(("name", "expr"), [*dashboard(), *alerts()])
def test_what_is_grouped_by_is_a_label_of_the_metric(name: str, expr: str) -> None:
    known = series()
    parsed = promql.parse(expr.replace(RANGE, "5m"))

    def walk(one: Any) -> Iterator[tuple[set[str], Any]]:
        if isinstance(one, promql.AggregateExpr):
            modifier = getattr(one, "modifier", None)
            labels = set(getattr(modifier, "labels", ()) or ())
            yield labels, one.expr
            yield from walk(one.expr)
            return
        named = (getattr(one, name, None) for name in ("expr", "lhs", "rhs"))
        for inside in (*named, *(getattr(one, "args", None) or ())):
            if inside is not None:
                yield from walk(inside)

    for labels, inside in walk(parsed):
        for one in selectors(inside):
            assert labels <= known[one.name]


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("sum(rate(kvmem_no_such_total[5m]))", ["metric kvmem_no_such_total"]),
        ('kvmem_tier_up{session="a"}', ["label session of kvmem_tier_up"]),
        ("rate(kvmem_load_seconds[5m])", ["metric kvmem_load_seconds"]),
        ("1 + 1", ["no metric"]),
    ],
)
def test_what_does_not_exist_is_seen(broken: str, told: list[str]) -> None:
    assert faults(broken) == told


def test_what_is_no_expression_is_seen() -> None:
    with pytest.raises(ValueError, match="parenthesis"):
        faults("sum(rate(kvmem_requests_total[5m])")


def test_every_metric_is_on_the_dashboard() -> None:
    text = (FOLDER / "grafana.json").read_text()
    assert [one.name for one in METRICS if one.name not in text] == []


def test_alerts_name_reasons_that_exist() -> None:
    for _, expr in alerts():
        for selector in selectors(promql.parse(expr)):
            for matcher in selector.matchers.matchers:
                if matcher.name == "reason":
                    assert set(matcher.value.split("|")) <= set(NAMES)


def test_every_alert_says_what_to_do() -> None:
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    for group in groups:
        for rule in group["rules"]:
            assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
            assert rule["labels"]["severity"] in ("info", "warning", "critical")
            assert rule["annotations"]["summary"]
            assert rule["annotations"]["description"]
