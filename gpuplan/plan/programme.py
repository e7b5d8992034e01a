"""An integer programme, built by variable and row, and solved by HiGHS through scipy.

Knows nothing of cards: variables are numbers that `variable` gave out, a row is a linear expression between two limits.
Where the work has to be limited, nodes give the same answer on every machine and seconds do not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Status = Literal["optimal", "feasible", "infeasible", "unknown"]
"""Feasible: a limit ended the search before the proof. Unknown: before anything was found."""

_INFEASIBLE = 2


@dataclass(frozen=True, slots=True)
class Limits:
    """When a solver may stop: after `seconds`, after `nodes` of its tree (None: no limit), or where what it has is
    within `gap` (a share of the objective) of what is possible."""

    seconds: float = 10.0
    gap: float = 0.0
    nodes: int | None = None


@dataclass(frozen=True, slots=True)
class Solution:
    """`values` by variable, none where nothing was found. No solution has an objective below `bound`."""

    status: Status
    values: tuple[float, ...]
    objective: float
    bound: float

    @property
    def found(self) -> bool:
        return bool(self.values)


class Programme:
    """Minimises a linear cost over variables that are zero or more unless said otherwise."""

    def __init__(self) -> None:
        self._low: list[float] = []
        self._high: list[float] = []
        self._integer: list[bool] = []
        self._rows: list[tuple[Mapping[int, float], float, float]] = []

    def variable(self, low: float = 0.0, high: float = math.inf, *, integer: bool = True) -> int:
        """A new variable."""
        self._low.append(low)
        self._high.append(high)
        self._integer.append(integer)
        return len(self._low) - 1

    def row(self, terms: Mapping[int, float], low: float = -math.inf, high: float = math.inf) -> None:
        """`low <= sum of coefficient * variable <= high`."""
        self._rows.append((terms, low, high))

    def relaxed(self, costs: Mapping[int, float]) -> float:
        """The least cost with fractions allowed: a bound on that of the programme. Infinity where there is none."""
        return self._solve(costs, Limits(), integer=False).objective

    def minimise(self, costs: Mapping[int, float], limits: Limits) -> Solution:
        """The best solution within the limits."""
        return self._solve(costs, limits, integer=True)

    def _solve(self, costs: Mapping[int, float], limits: Limits, *, integer: bool) -> Solution:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        width = len(self._low)
        cost = np.zeros(width)
        for variable, value in costs.items():
            cost[variable] = value
        filled = [(i, variable, value) for i, (row, _, _) in enumerate(self._rows) for variable, value in row.items()]
        places, columns, values = zip(*filled, strict=True) if filled else ((), (), ())
        matrix = csr_array((values, (places, columns)), shape=(len(self._rows), width))
        low, high = [row[1] for row in self._rows], [row[2] for row in self._rows]
        options = {"time_limit": max(limits.seconds, 0.01), "mip_rel_gap": limits.gap}
        if limits.nodes is not None:
            options["node_limit"] = limits.nodes
        solved = milp(
            cost,
            constraints=LinearConstraint(matrix, low, high) if filled else None,
            integrality=np.array(self._integer if integer else [False] * width, dtype=int),
            bounds=Bounds(self._low, self._high),
            options=options,
        )
        if solved.x is None:
            return Solution("infeasible" if solved.status == _INFEASIBLE else "unknown", (), math.inf, -math.inf)
        bound = solved.mip_dual_bound if integer else solved.fun
        return Solution(
            "optimal" if solved.status == 0 else "feasible",
            tuple(float(v) for v in solved.x),
            float(solved.fun),
            -math.inf if bound is None else float(bound),
        )
