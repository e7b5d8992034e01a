"""A plan's pace as the `behavior` of a HorizontalPodAutoscaler, which KEDA hands on unchanged.

Up: what the queue asks for, at most twice the pods in a cool-down, since a replica that starts does not serve yet.
Down: one pod in a cool-down, and only what was not needed for the whole stabilization window.
"""

from __future__ import annotations

import math
from typing import Any

from gpuplan.export import names

SURGE = "maxSurge: 0 in your Deployment, where it is not: a rollout's extra pods are counted as replicas to keep."
"""An HPA whose metric is within tolerance proposes `status.replicas`, extra pods included (Kubernetes, replica
calculator)."""
PERIOD_S_MAX, WINDOW_S_MAX = 1800, 3600
"""The API server refuses more (Kubernetes, HorizontalPodAutoscaler v2)."""


def of(rule: dict[str, Any]) -> dict[str, Any]:
    """`behavior` of one model's thresholds."""
    period_s = min(max(math.ceil(rule["cooldown_s"]), 1), PERIOD_S_MAX)
    window_s = min(math.ceil(rule["stabilization_window_s"]), WINDOW_S_MAX)
    return {
        "scaleUp": {
            "stabilizationWindowSeconds": 0,
            "selectPolicy": "Max",
            "policies": [
                {"type": "Percent", "value": 100, "periodSeconds": period_s},
                {"type": "Pods", "value": 1, "periodSeconds": period_s},
            ],
        },
        "scaleDown": {
            "stabilizationWindowSeconds": window_s,
            "policies": [{"type": "Pods", "value": 1, "periodSeconds": period_s}],
        },
    }


def told(model: str, rule: dict[str, Any]) -> str:
    """The thresholds in a sentence."""
    return (
        f"{names.shown(model, 60)}: up above {rule['scale_up_at']:g} requests waiting per replica, down only below "
        f"{rule['scale_down_at']:g}; {rule['min_replicas']} to {rule['max_replicas']} replicas; cool-down "
        f"{rule['cooldown_s']:g} s, stabilization window {rule['stabilization_window_s']:g} s."
    )


def bounds(rule: dict[str, Any]) -> tuple[int, int]:
    """The fewest and the most replicas, as both autoscalers accept them."""
    least = max(int(rule["min_replicas"]), 1)
    return least, max(int(rule["max_replicas"]), least)
