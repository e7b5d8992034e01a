"""Rules on thresholds that make N replicas and N-1 take turns.

An HPA has no threshold down. With a target T per replica it goes from N to N-1 when all of it together is no more than
(N-1) T. That is sound for what N replicas and N-1 share out between them, such as requests in flight. A queue or a
latency is not shared out: N replicas keep it near zero at the very load that makes it grow without end with N-1.
"""

from __future__ import annotations

from collections.abc import Iterator

from gpuplan.export.lint import signals
from gpuplan.export.lint.objects import Finding, Scaled, Signal, number


def check(one: Scaled) -> Iterator[Finding]:
    """What is found, in no order."""
    if one.combined:
        return
    if one.most > max(one.least, 1) and one.signals and not _disabled(one) and all(_empties(s) for s in one.signals):
        signal = one.signals[0]
        low = max(one.least, 1)
        below = f"when no more than {signal.target * low:g} is left in all, " if signal.target else ""
        per = f"{signal.target * low / (low + 1):g} each, " if signal.target and signal.kind == "AverageValue" else ""
        if signal.kind != "AverageValue":
            below = f"below {signal.target:g}, " if signal.target else ""
        yield one.finding(
            signal.key, signal.written,
            f"{low + 1} replicas go to {low} {below}{per}which is also what {low + 1} show at a load that {low} cannot "
            f"bear: they go, a queue builds, they come again",
            "add a metric that falls only with the load (requests running, KV cache in use), or one that holds the "
            "replicas while any queue is left, as gpuplan export --to keda writes",
        )  # fmt: skip
    if one.keda and one.least == 0:
        yield from _activation(one)


def _activation(one: Scaled) -> Iterator[Finding]:
    for i, trigger in enumerate(one.spec.get("triggers") or []):
        told = trigger.get("metadata") or {}
        low, high = number(told.get("activationThreshold")), number(told.get("threshold"))
        if low is not None and high is not None and low >= high:
            yield one.finding(
                f"spec.triggers[{i}].metadata.activationThreshold", told["activationThreshold"],
                f"below it all replicas go, and from threshold, {high:g}, on more are asked for: between the two KEDA "
                "removes what the HPA needs",
                "write less than threshold",
            )  # fmt: skip


def _empties(signal: Signal) -> bool:
    """Whether it shows nothing while replicas suffice. A comparison that gives 0 or 1 holds replicas on purpose."""
    if signal.shape is not None and signal.shape.switch:
        return False
    return bool(signal.names) and all(signals.empties(name) for name in signal.names)


def _disabled(one: Scaled) -> bool:
    return (one.behavior.get("scaleDown") or {}).get("selectPolicy") == "Disabled"
