"""Rules on what the API server refuses, or takes and never uses: versions, replica counts, limits of `behavior`."""

from __future__ import annotations

from collections.abc import Iterator

from gpuplan.export.behavior import PERIOD_S_MAX, WINDOW_S_MAX
from gpuplan.export.lint.objects import Finding, Scaled, number

GONE = {"autoscaling/v2beta1": "1.25", "autoscaling/v2beta2": "1.26", "keda.k8s.io/v1alpha1": "KEDA 2"}
"""Where each was removed (Kubernetes, deprecation guide; KEDA, migration guide)."""


def check(one: Scaled) -> Iterator[Finding]:
    """What is found, in no order."""
    if one.api in GONE:
        new = "keda.sh/v1alpha1" if one.keda else "autoscaling/v2"
        yield one.finding("apiVersion", one.api, f"no longer served since {GONE[one.api]}", f"write {new}")
    if one.most < max(one.least, 1):
        yield one.finding(one.most_key, one.most, f"less than {one.least_key}, {one.least}", "exchange them")
    elif one.most == one.least:
        yield one.finding(one.most_key, one.most, "the same as the least: nothing is ever scaled", "raise it")
    if not one.signals and one.api != "autoscaling/v1":
        key = "spec.triggers" if one.keda else "spec.metrics"
        yield one.finding(key, None, "nothing says when to scale", "name a metric and a target")
    for way in ("scaleUp", "scaleDown"):
        rules = one.behavior.get(way) or {}
        at = f"{one.behavior_key}.{way}"
        window = number(rules.get("stabilizationWindowSeconds"))
        if window is not None and not 0 <= window <= WINDOW_S_MAX:
            yield one.finding(
                f"{at}.stabilizationWindowSeconds", rules["stabilizationWindowSeconds"],
                "the API server refuses it", f"write 0 to {WINDOW_S_MAX}",
            )  # fmt: skip
        for i, policy in enumerate(rules.get("policies") or []):
            period = number(policy.get("periodSeconds"))
            if period is not None and not 0 < period <= PERIOD_S_MAX:
                yield one.finding(
                    f"{at}.policies[{i}].periodSeconds", policy["periodSeconds"],
                    "the API server refuses it", f"write 1 to {PERIOD_S_MAX}",
                )  # fmt: skip
    idle = one.spec.get("idleReplicaCount")
    if one.keda and idle is not None and (idle != 0 or one.least == 0):
        why = "KEDA takes only 0" if idle else "not below minReplicaCount"
        yield one.finding("spec.idleReplicaCount", idle, why, "write 0 and a minReplicaCount above it")
