"""How long the steps of one replica take in one simulation.

The mean of a step comes from its load; the spread from the ratios that were measured, drawn in advance for each
replica. So two deployments that are simulated with one seed meet the same luck, and of many steps in a row the whole is
known without looking at each.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import accumulate

from gpuplan.hardware.roofline import StepLoad

DRAWS = 1024
"""Ratios drawn at a time."""


class StepClock:
    """Steps of one replica: `mean_s` gives a step's mean seconds, `ratios` how much longer or shorter one may take, in
    an order by `seed`."""

    def __init__(self, mean_s: Callable[[StepLoad], float], ratios: tuple[float, ...], seed: str) -> None:
        self._mean_s, self._ratios = mean_s, ratios
        self._rng = random.Random(seed)  # noqa: S311 - not for secrets
        self._sums = [0.0]  # of the first 0, 1, 2, ... ratios drawn
        self._at = 0
        self._first_s = self._growth_s = 0.0
        self._steps = 1

    def begin(self, load: StepLoad, steps: int) -> float:
        """Seconds that so many steps in a row take together, the first of them with this load. They begin now."""
        self._steps, self._first_s = steps, self._mean_s(load)
        if steps > 1:  # every sequence's context grows by a token a step
            grown = load.context_tokens + load.decodes * (steps - 1)
            last = StepLoad(load.prefill_tokens, load.attended_pairs, load.decodes, grown, load.samples)
            self._growth_s = (self._mean_s(last) - self._first_s) / (steps - 1)
        if self._ratios and self._at + steps >= len(self._sums):
            self._draw(steps)
        return self._seconds(steps)

    def cut(self, after_s: float) -> tuple[int, float]:
        """The steps in a row end with the one that runs `after_s` after they began: how many that makes, and how many
        seconds they take together."""
        few, many = 1, self._steps
        while few < many:
            middle = (few + many) // 2
            if self._seconds(middle) < after_s:
                few = middle + 1
            else:
                many = middle
        return few, self._seconds(few)

    def ran(self, steps: int) -> None:
        """So many of them have run."""
        self._at += steps

    def _seconds(self, steps: int) -> float:
        mean_s = self._first_s + self._growth_s * (steps - 1) / 2
        return mean_s * (self._sums[self._at + steps] - self._sums[self._at] if self._ratios else steps)

    def _draw(self, steps: int) -> None:
        """More, and those that are used up are forgotten."""
        left = [b - a for a, b in zip(self._sums[self._at :], self._sums[self._at + 1 :], strict=False)]
        more = self._rng.choices(self._ratios, k=max(DRAWS, steps))
        self._sums, self._at = [0.0, *accumulate(left + more)], 0
