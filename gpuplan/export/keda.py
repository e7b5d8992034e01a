"""KEDA ScaledObjects (keda.sh/v1alpha1), one a model, with Prometheus triggers whose queries give one element.

KEDA divides a query's answer by the replicas itself (AverageValue), so the first query is the total that waits and its
threshold the plan's, per replica. The second holds the replicas there are until fewer wait than the plan's threshold
to scale down. `cooldownPeriod` is left out: KEDA uses it for the step to zero alone; what the plan calls cool-down is
in the HPA's policies.
"""

from __future__ import annotations

from typing import Any

from gpuplan.export import behavior, metrics, names, yaml_text
from gpuplan.export.reading import Plan

PROMETHEUS = "http://prometheus-server.monitoring.svc:80"
"""Where Prometheus' Helm chart puts its server when installed in the namespace `monitoring`."""


def write(plan: Plan, source: str) -> str:
    """The objects. Raises InputError for a plan without thresholds, and for an unknown `source` of metrics."""
    rules, blind = metrics.visible(plan, source)
    comments = yaml_text.head(
        plan,
        "KEDA ScaledObjects.",
        from_plan=[behavior.told(model, rule) for model, rule in rules.items()],
        fill_in=[
            "serverAddress of your Prometheus; spec.scaleTargetRef.name, where your Deployment is not called like the "
            "model; a namespace in the queries, where several run the same model.",
            behavior.SURGE,
            *(
                f"{names.shown(model, 60)} has no file: Triton's vLLM backend shows no queue; use --metrics vllm."
                for model in blind
            ),
        ],
    )
    return yaml_text.written(comments, *(([], _document(source, m, rule)) for m, rule in rules.items()))


def _document(source: str, model: str, rule: dict[str, Any]) -> dict[str, Any]:
    least, most = behavior.bounds(rule)
    held = metrics.replicas_held(source, model, rule["scale_down_at"])
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": {"name": names.label(model)},
        "spec": {
            "scaleTargetRef": {"name": names.label(model)},
            "minReplicaCount": least,
            "maxReplicaCount": most,
            "fallback": {"failureThreshold": 3, "replicas": least, "behavior": "currentReplicasIfHigher"},
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": behavior.of(rule)}},
            "triggers": [
                _trigger("waiting", metrics.waiting_total(source, model), f"{max(rule['scale_up_at'], 0.001):g}"),
                _trigger("held", held, "1"),
            ],
        },
    }


def _trigger(name: str, query: str, threshold: str) -> dict[str, Any]:
    """A lost Prometheus is an error and not an empty queue (`ignoreNullValues`), so that `fallback` counts."""
    return {
        "type": "prometheus",
        "name": name,
        "metricType": "AverageValue",
        "metadata": {
            "serverAddress": PROMETHEUS,
            "query": query,
            "threshold": threshold,
            "ignoreNullValues": "false",
        },
    }
