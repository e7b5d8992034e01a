"""An HPA and a ScaledObject in the same terms, for rules that mean both; and what a rule finds."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from gpuplan.errors import InputError
from gpuplan.export.lint import promql
from gpuplan.export.lint.promql import Shape
from gpuplan.scenario.text import line_of

TOLERANCE = 0.1
"""An HPA changes nothing while a metric is within a tenth of its target (--horizontal-pod-autoscaler-tolerance)."""
_SUFFIXES = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
             "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50, "Ei": 2.0**60}  # fmt: skip
_QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)([numkMGTPE]|[KMGTPE]i)?")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that will not work: where it is written, why not, and what to do. `line` is the key's own, or of what
    it belongs in."""

    file: str
    line: int | None
    name: str
    key: str
    value: object
    why: str
    do: str

    def __str__(self) -> str:
        where = self.file + (f":{self.line}" if self.line else "")
        value = "left out" if self.value is None else repr(self.value)
        text = f"{where}: {self.name}: {self.key} = {_short(value)}: {self.why}; {self.do}"
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True, slots=True)
class Signal:
    """One metric and its target: per replica (`AverageValue`), in all (`Value`), or in percent (`Utilization`)."""

    key: str
    """Where the target stands."""
    target: float | None
    written: object
    kind: str
    names: frozenset[str]
    query_key: str = ""
    query: str = ""
    shape: Shape | None = None


@dataclass(frozen=True, slots=True)
class Scaled:
    """What is scaled by what. `behavior_key` is where the HPA's `behavior` stands; `least` and `most` are replicas."""

    file: str
    kind: str
    name: str
    spec: dict[str, Any]
    lines: dict[str, int]
    scales: tuple[str, str, str]
    least: int
    most: int
    behavior: dict[str, Any]
    behavior_key: str
    api: str
    signals: list[Signal] = field(default_factory=list)

    @property
    def combined(self) -> bool:
        """Whether KEDA makes one metric of all by a formula, with a target of its own: their own mean nothing then."""
        return self.keda and bool((self.spec.get("advanced") or {}).get("scalingModifiers"))

    @property
    def keda(self) -> bool:
        return self.kind == "ScaledObject"

    @property
    def most_key(self) -> str:
        return "spec.maxReplicaCount" if self.keda else "spec.maxReplicas"

    @property
    def least_key(self) -> str:
        return "spec.minReplicaCount" if self.keda else "spec.minReplicas"

    def malformed(self) -> InputError:
        """The error for an object whose shape is not that of its kind."""
        return _malformed(self.kind, self.file)

    def finding(self, key: str, value: object, why: str, do: str) -> Finding:
        """A finding at that key, or at the nearest one that is written."""
        return Finding(self.file, line_of(key, self.lines), self.name, key, value, why, do)


def scaled(data: dict[str, Any], lines: dict[str, int], file: str) -> Scaled:
    """The object in common terms. Raises InputError where its shape is not that of its kind."""
    try:
        return _scaled(data, lines, file)
    except (TypeError, AttributeError, ValueError, KeyError):
        raise _malformed(data["kind"], file) from None


def _malformed(kind: str, file: str) -> InputError:
    return InputError(f"not a {kind}: a part of it is of another type", file=file)


def number(written: object) -> float | None:
    """A Kubernetes quantity or a plain number; None for what is neither."""
    match = _QUANTITY.fullmatch(str(written).strip())
    return float(match[1]) * _SUFFIXES[match[2] or ""] if match else None


def _scaled(data: dict[str, Any], lines: dict[str, int], file: str) -> Scaled:
    kind, spec, meta = data["kind"], data.get("spec") or {}, data.get("metadata") or {}
    target = spec.get("scaleTargetRef") or {}
    space = str(meta.get("namespace", ""))
    keda = kind == "ScaledObject"
    if keda:
        config = (spec.get("advanced") or {}).get("horizontalPodAutoscalerConfig") or {}
        behavior, behavior_key = config.get("behavior"), "spec.advanced.horizontalPodAutoscalerConfig.behavior"
        least, most = _or(spec.get("minReplicaCount"), 0), _or(spec.get("maxReplicaCount"), 100)
    else:
        behavior, behavior_key = spec.get("behavior"), "spec.behavior"
        least, most = _or(spec.get("minReplicas"), 1), _or(spec.get("maxReplicas"), 0)
    signals = _triggers(spec) if keda else _metrics(spec)
    return Scaled(
        file=file,
        kind=kind,
        name=f"{kind}/{meta.get('name', '?')}",
        spec=dict(spec),
        lines=lines,
        scales=(space, str(target.get("kind", "Deployment")), str(target.get("name", ""))),
        least=int(least),
        most=int(most),
        behavior=dict(behavior or {}),
        behavior_key=behavior_key,
        api=str(data.get("apiVersion", "")),
        signals=signals,
    )


def _or(written: Any, default: int) -> Any:
    return default if written is None else written


def _triggers(spec: dict[str, Any]) -> list[Signal]:
    found = []
    for i, trigger in enumerate(spec.get("triggers") or []):
        told, at = trigger.get("metadata") or {}, f"spec.triggers[{i}].metadata"
        query = str(told.get("query", ""))
        shape = promql.read(query) if trigger.get("type") == "prometheus" else None
        names = (shape.plain | shape.counted) if shape else frozenset(_words(query, told))
        key = "threshold" if "threshold" in told else "value" if "value" in told else "threshold"
        kind = str(trigger.get("metricType", "AverageValue"))
        if trigger.get("type") in ("cpu", "memory"):
            kind = str(trigger.get("metricType", "Utilization"))
        found.append(
            Signal(f"{at}.{key}", number(told.get(key)), told.get(key), kind, names, f"{at}.query", query, shape)
        )
    return found


def _metrics(spec: dict[str, Any]) -> list[Signal]:
    found = []
    for i, metric in enumerate(spec.get("metrics") or []):
        kind = str(metric.get("type", ""))
        part = kind[:1].lower() + kind[1:]
        told = metric.get(part) or {}
        name = str((told.get("metric") or {}).get("name") or told.get("name") or "")
        target = told.get("target") or {}
        key = next((k for k in ("averageValue", "value", "averageUtilization") if k in target), "averageValue")
        how = {"averageValue": "AverageValue", "value": "Value"}.get(key, "Utilization")
        at = f"spec.metrics[{i}].{part}.target.{key}"
        names = frozenset([name if kind != "Resource" else f"resource {name}"])
        found.append(Signal(at, number(target.get(key)), target.get(key), how, names))
    return found


def _words(query: str, told: dict[str, Any]) -> list[str]:
    name = str(told.get("metricName") or told.get("queueName") or "")
    return [*re.findall(r"[A-Za-z_:][A-Za-z0-9_:]{5,}", query), *([name] if name else [])]


def _short(text: str) -> str:
    return text if len(text) <= 100 else text[:97] + "..."
