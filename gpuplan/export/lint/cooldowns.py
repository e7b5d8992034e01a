"""Rules on times that do not do what their names promise: cool-downs, intervals, windows and policies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpuplan.export.lint.objects import Finding, Scaled, number

KEDA_COOLDOWN_S = 300
"""KEDA's default cooldownPeriod."""
HPA_WINDOW_S = 300
"""The default stabilization window down."""


def check(one: Scaled) -> Iterator[Finding]:
    """What is found, in no order."""
    if one.keda:
        yield from _keda(one)
    yield from _down(one)
    yield from _up(one)


def _keda(one: Scaled) -> Iterator[Finding]:
    spec = one.spec
    window = f"{one.behavior_key}.scaleDown.stabilizationWindowSeconds"
    down = one.behavior.get("scaleDown") or {}
    cooldown = spec.get("cooldownPeriod")
    if cooldown is not None and one.least >= 1 and "idleReplicaCount" not in spec:
        yield one.finding(
            "spec.cooldownPeriod", cooldown,
            f"KEDA waits for it before the step to zero alone, and minReplicaCount is {one.least}: from N to N-1 goes "
            f"the HPA, after its own {down.get('stabilizationWindowSeconds', HPA_WINDOW_S)} s",
            f"remove it, and write {window}",
        )  # fmt: skip
    elif cooldown not in (None, KEDA_COOLDOWN_S) and one.most > 1 and "stabilizationWindowSeconds" not in down:
        yield one.finding(
            "spec.cooldownPeriod", cooldown,
            f"it is for the last replica alone: from N to N-1 goes the HPA, after its default {HPA_WINDOW_S} s",
            f"write {window} too",
        )  # fmt: skip
    if one.least < 1:
        return
    cached = any(trigger.get("useCachedMetrics") for trigger in spec.get("triggers") or [])
    if spec.get("pollingInterval") is not None and not cached and "idleReplicaCount" not in spec:
        yield one.finding(
            "spec.pollingInterval", spec["pollingInterval"],
            f"KEDA polls for the step from zero alone, and minReplicaCount is {one.least}: the HPA asks every 15 s",
            "remove it, or write useCachedMetrics: true at the trigger",
        )  # fmt: skip
    if "idleReplicaCount" in spec:
        return
    for i, trigger in enumerate(spec.get("triggers") or []):
        told = trigger.get("metadata") or {}
        for key in ("activationThreshold", "activationValue"):
            if key in told:
                yield one.finding(
                    f"spec.triggers[{i}].metadata.{key}", told[key],
                    f"it decides between zero and one replica alone, and minReplicaCount is {one.least}",
                    "remove it",
                )  # fmt: skip


def _down(one: Scaled) -> Iterator[Finding]:
    rules: dict[str, Any] = one.behavior.get("scaleDown") or {}
    at = f"{one.behavior_key}.scaleDown"
    if rules.get("selectPolicy") == "Disabled":
        yield one.finding(
            f"{at}.selectPolicy", "Disabled", "no replica is ever removed: each peak is paid for until somebody acts",
            "remove it, and write a long stabilizationWindowSeconds",
        )  # fmt: skip
        return
    window = rules.get("stabilizationWindowSeconds")
    if window is not None and number(window) == 0:
        yield one.finding(
            f"{at}.stabilizationWindowSeconds", window,
            "one look at a moment's lull removes replicas that are needed in the next; a policy's periodSeconds limits "
            "how many go, not why",
            f"write {HPA_WINDOW_S} or more: at least twice a replica's start",
        )  # fmt: skip
    policies = rules.get("policies") or []
    if len(policies) > 1 and rules.get("selectPolicy", "Max") == "Max":
        yield one.finding(
            f"{at}.selectPolicy", rules.get("selectPolicy"),
            f"of the {len(policies)} policies the one that removes most counts (Max), so the slower ones limit nothing",
            "write selectPolicy: Min, or keep one policy",
        )  # fmt: skip


def _up(one: Scaled) -> Iterator[Finding]:
    rules: dict[str, Any] = one.behavior.get("scaleUp") or {}
    at = f"{one.behavior_key}.scaleUp"
    if rules.get("selectPolicy") == "Disabled":
        yield one.finding(f"{at}.selectPolicy", "Disabled", "no replica is ever added", "remove it")
    window = number(rules.get("stabilizationWindowSeconds"))
    if window is not None and window >= HPA_WINDOW_S:
        yield one.finding(
            f"{at}.stabilizationWindowSeconds", rules["stabilizationWindowSeconds"],
            "upwards the least of the window counts: a rise is answered so many seconds later, and the replica has to "
            "start then",
            "write 0 to 60",
        )  # fmt: skip
