"""Rules on a metric and its target: one it can never reach, one it always reaches, and a query of several elements."""

from __future__ import annotations

from collections.abc import Iterator

from gpuplan.export.lint import signals
from gpuplan.export.lint.objects import TOLERANCE, Finding, Scaled, Signal, number


def check(one: Scaled) -> Iterator[Finding]:
    """What is found, in no order."""
    for signal in one.signals:
        if not one.combined:
            yield from _target(one, signal)
        if signal.shape is not None:
            yield from _query(one, signal)
    if one.keda and one.least >= 1:
        yield from _nulls(one)


def _target(one: Scaled, signal: Signal) -> Iterator[Finding]:
    if signal.target is None or signal.target <= 0:
        if signal.written is not None or signal.query:
            yield one.finding(signal.key, signal.written, "not a target", "write a number above zero")
        return
    most = _most(signal)
    up = one.behavior.get("scaleUp") or {}
    tolerance = number(up.get("tolerance"))
    needed = signal.target * (1 + (TOLERANCE if tolerance is None else tolerance))
    if most is not None and most <= needed:
        name = ", ".join(sorted(signal.names))
        beyond = "" if signal.target >= most else f", and replicas are added only above {needed:g}, a tenth more"
        yield one.finding(
            signal.key, signal.written, f"{name} is never more than {most:g}{beyond}: nothing is ever added",
            f"write a target well below {most:g}, such as {0.7 * most:g}",
        )  # fmt: skip
    for name in sorted(signal.names):
        if name.startswith("resource ") and name not in ("resource cpu", "resource memory", "resource "):
            yield one.finding(
                signal.key, signal.written, f"a Resource metric knows only cpu and memory, not {name[9:]}",
                "take type: Pods and a metric that the server or a DCGM exporter shows",
            )  # fmt: skip
        if signals.reserved(name):
            yield one.finding(
                signal.key, signal.written, f"{name} does not follow the load: engines take their KV cache at start",
                "scale on requests waiting, or on the cache's use (vllm:kv_cache_usage_perc)",
            )  # fmt: skip


def _most(signal: Signal) -> float | None:
    """The most that the signal can show against its target; None where that is not known."""
    if len(signal.names) != 1 or signal.kind == "Utilization":
        return None
    most = signals.ceiling(next(iter(signal.names)))
    if most is None or signal.shape is None:
        return most if signal.kind == "AverageValue" else None
    shape = signal.shape
    if shape.counted or shape.factor is None or (shape.outer == "sum" and signal.kind == "Value"):
        return None
    return most * shape.factor


def _query(one: Scaled, signal: Signal) -> Iterator[Finding]:
    shape = signal.shape
    assert shape is not None, "asked only with one"
    apart = shape.apart
    if apart is None or apart:
        by = f"one for each {', '.join(sorted(apart))}" if apart else "one for each pod that is scraped"
        yield one.finding(
            signal.query_key, signal.query,
            f"gives several elements, {by}, and KEDA takes a query with one alone: the trigger fails",
            "put sum(...) around it, without by",
        )  # fmt: skip
    elif one.combined:
        pass
    elif shape.outer in ("avg", "max", "min", "quantile", "histogram_quantile") and signal.kind == "AverageValue":
        yield one.finding(
            signal.query_key, signal.query,
            f"{shape.outer} is one pod's value already, and AverageValue divides it by the replicas once more: with "
            "N of them the target counts N-fold",
            "write sum(...), or metricType: Value",
        )  # fmt: skip
    elif shape.outer == "sum" and signal.kind == "Value":
        yield one.finding(
            signal.query_key, signal.query,
            "a sum grows with the replicas, and Value multiplies them by sum / threshold: the more there are the more "
            "are added",
            "write metricType: AverageValue with a threshold per replica",
        )  # fmt: skip
    rising = sorted(name for name in shape.plain if signals.counts(name))
    if rising and shape.outer != "histogram_quantile":
        yield one.finding(
            signal.query_key, signal.query, f"{rising[0]} is a counter and only rises: replicas are added to the most "
            "and never removed", f"write rate({rising[0]}[1m])",
        )  # fmt: skip


def _nulls(one: Scaled) -> Iterator[Finding]:
    for i, trigger in enumerate(one.spec.get("triggers") or []):
        told = trigger.get("metadata") or {}
        if trigger.get("type") == "prometheus" and str(told.get("ignoreNullValues", "true")).lower() == "true":
            yield one.finding(
                f"spec.triggers[{i}].metadata.ignoreNullValues", told.get("ignoreNullValues"),
                "by default a query without a result counts as 0: when Prometheus loses the pods, they are removed",
                'write "false", and spec.fallback for the replicas to have then',
            )  # fmt: skip
