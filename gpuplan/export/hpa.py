"""Kubernetes HorizontalPodAutoscalers (autoscaling/v2), one a model, on external metrics.

Two metrics each, of which the larger proposal counts: requests waiting against the threshold to scale up; and the
replicas there are, while more wait than the threshold to scale down allows. The second keeps N from flapping with N-1:
a queue that N replicas keep empty says nothing of what N-1 would do.
"""

from __future__ import annotations

import math
from typing import Any

from gpuplan.export import behavior, metrics, names, yaml_text
from gpuplan.export.reading import Plan

API = "autoscaling/v2"


def write(plan: Plan, source: str) -> str:
    """The objects, and in comments what prometheus-adapter needs for their metrics. Raises InputError for a plan
    without thresholds, and for an unknown `source` of metrics."""
    import yaml

    rules, blind = metrics.visible(plan, source)
    adapter = {"rules": {"external": [r for model, rule in rules.items() for r in _adapter(source, model, rule)]}}
    comments = yaml_text.head(
        plan,
        "Kubernetes HorizontalPodAutoscalers.",
        from_plan=[behavior.told(model, rule) for model, rule in rules.items()],
        fill_in=[
            "spec.scaleTargetRef.name, where your Deployment is not called like the model.",
            behavior.SURGE,
            *(
                f"{names.shown(model, 60)} has no file: Triton's vLLM backend shows no queue; use --metrics vllm."
                for model in blind
            ),
            "the metrics: they are external ones, which prometheus-adapter serves with these Helm values:",
        ],
    )
    lines = yaml.safe_dump(adapter, sort_keys=False, width=10**6).splitlines()
    comments += [f"#   {line}" for line in lines]
    return yaml_text.written(comments, *(([], _document(model, rule)) for model, rule in rules.items()))


def quantity(value: float) -> str:
    """A Kubernetes quantity in thousandths, never zero: `260m` is 0.26."""
    return f"{max(math.ceil(round(value * 1000, 6)), 1)}m"


def _document(model: str, rule: dict[str, Any]) -> dict[str, Any]:
    least, most = behavior.bounds(rule)
    waiting, held = _metric_names(model)
    return {
        "apiVersion": API,
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": names.label(model)},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": names.label(model)},
            "minReplicas": least,
            "maxReplicas": most,
            "metrics": [_external(waiting, quantity(rule["scale_up_at"])), _external(held, "1")],
            "behavior": behavior.of(rule),
        },
    }


def _external(name: str, per_replica: str) -> dict[str, Any]:
    target = {"type": "AverageValue", "averageValue": per_replica}
    return {"type": "External", "external": {"metric": {"name": name}, "target": target}}


def _metric_names(model: str) -> tuple[str, str]:
    stem = names.label(model).replace("-", "_")
    return f"{stem}_requests_waiting", f"{stem}_replicas_held"


def _adapter(source: str, model: str, rule: dict[str, Any]) -> list[dict[str, Any]]:
    """Rules that make an external metric of each query; `seriesQuery` is how the adapter finds that it is there."""
    waiting, held = _metric_names(model)
    queries = {
        waiting: metrics.waiting_total(source, model),
        held: metrics.replicas_held(source, model, rule["scale_down_at"]),
    }
    series = metrics.queue(source).gauge
    return [
        {
            "seriesQuery": series,
            "metricsQuery": query,
            "name": {"as": name},
            "resources": {"namespaced": False},
        }
        for name, query in queries.items()
    ]
