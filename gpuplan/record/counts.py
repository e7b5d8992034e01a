"""Steps that were counted and not kept."""

from __future__ import annotations


class StepCounts:
    """A model's steps, where they were only counted: how many of each size, and their seconds together."""

    __slots__ = ("busy_s", "by_size", "steps")

    def __init__(self) -> None:
        self.steps = 0
        self.by_size: dict[int, int] = {}
        self.busy_s = 0.0

    def add(self, size: int, steps: int, seconds: float) -> None:
        """So many steps of one size took so long together."""
        self.steps += steps
        self.by_size[size] = self.by_size.get(size, 0) + steps
        self.busy_s += seconds
