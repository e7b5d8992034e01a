"""`--fail-on "classes.codegen.ttft_ms.p95 > 500"`: a figure of the summary held against a number.

Takes the text, gives a Condition; several are joined with commas. A figure that is null fails no condition, and is
said so by `broken`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from gpuplan.errors import InputError

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_FORM = re.compile(r"^\s*(\S+)\s*(>=|<=|>|<)\s*(-?[0-9.]+(?:e-?[0-9]+)?)\s*$")
_ALLOWED = 'e.g. "overall.slo_attainment < 0.99" or "classes.NAME.ttft_ms.p95 > 500"'


class Condition(NamedTuple):
    """`path` is a dotted path into a summary."""

    path: str
    comparison: str
    limit: float

    def broken(self, summary: dict[str, Any]) -> str | None:
        """A line saying how the summary meets the condition to fail, or None. Raises InputError for a path that is
        not there."""
        value = _at(summary, self.path)
        if value is not None and _OPERATORS[self.comparison](value, self.limit):
            return f"{self.path} is {value:.6g}: {self.comparison} {self.limit:g}"
        return None


def parse(text: str) -> list[Condition]:
    """The conditions in `text`. Raises InputError for one that is none."""
    conditions = []
    for part in text.split(","):
        match = _FORM.match(part)
        if match is None:
            raise InputError("not a condition", key="--fail-on", value=part.strip(), allowed=_ALLOWED)
        conditions.append(Condition(match[1], match[2], float(match[3])))
    return conditions


def _at(data: Any, path: str) -> float | None:
    """The number at a dotted path; keys may hold dots themselves."""
    whole, rest = path, path
    while isinstance(data, dict):
        keys = [key for key in data if rest == key or rest.startswith(f"{key}.")]
        if not keys:
            raise InputError("no such figure", key="--fail-on", value=whole, allowed=f"under it: {', '.join(data)}")
        key = max(keys, key=len)
        data, rest = data[key], rest[len(key) + 1 :]
    if rest or not (data is None or isinstance(data, int | float)):
        raise InputError("not a number", key="--fail-on", value=whole, allowed=_ALLOWED)
    return None if data is None else float(data)
