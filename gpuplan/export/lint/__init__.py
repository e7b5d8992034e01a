"""What will not work in a HorizontalPodAutoscaler or a KEDA ScaledObject: `lint` gives one Finding for each.

Reads the file alone. What depends on the cluster (whether a metric is there at all) it cannot see, and says nothing of;
nor of a query that it does not understand.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpuplan.errors import InputError
from gpuplan.export.lint import bounds, cooldowns, flapping, targets
from gpuplan.export.lint.objects import Finding as Finding
from gpuplan.export.lint.objects import Scaled, scaled
from gpuplan.scenario import text

RULES = (bounds.check, targets.check, cooldowns.check, flapping.check)


def lint(path: Path) -> list[Finding]:
    """The findings, by line. Raises InputError for a file that cannot be read or holds neither kind of object."""
    try:
        objects = list(_objects(text.documents(path)))
    except InputError:
        if b"{{" not in path.read_bytes():
            raise
        raise InputError("a template and no YAML", file=str(path), allowed="what `helm template` makes of it") from None
    found = [scaled(data, lines, str(path)) for data, lines in objects]
    if not found:
        raise InputError(
            "nothing to look at", file=str(path), allowed="a HorizontalPodAutoscaler or a KEDA ScaledObject"
        )
    findings = [finding for one in found for finding in _of(one)]
    findings += _doubled(found)
    return sorted(findings, key=lambda f: (f.line or 0, f.key))


def _of(one: Scaled) -> list[Finding]:
    try:
        return [finding for rule in RULES for finding in rule(one)]
    except (TypeError, AttributeError, ValueError, KeyError):
        raise one.malformed() from None


def _objects(documents: list[tuple[Any, dict[str, int]]]) -> Iterator[tuple[dict[str, Any], dict[str, int]]]:
    for data, lines in documents:
        if not isinstance(data, dict):
            continue
        if data.get("kind") == "List" and isinstance(data.get("items"), list):
            for i, item in enumerate(data["items"]):
                start = f"items[{i}]."
                inner = {key.removeprefix(start): line for key, line in lines.items() if key.startswith(start)}
                yield from _objects([(item, inner)])
        elif data.get("kind") in ("HorizontalPodAutoscaler", "ScaledObject"):
            yield data, lines


def _doubled(found: list[Scaled]) -> Iterator[Finding]:
    seen: dict[tuple[str, str, str], Scaled] = {}
    for one in found:
        first = seen.setdefault(one.scales, one) if one.scales[2] else one
        if first is not one:
            yield one.finding(
                "spec.scaleTargetRef.name",
                one.scales[2],
                f"{first.name} scales it too, and each undoes what the other does",
                "keep one object, with the metrics of both",
            )
