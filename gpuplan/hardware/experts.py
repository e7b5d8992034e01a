"""How a step's tokens fall upon a mixture's experts.

Every token is taken to choose its experts evenly and independently of the others. Training balances experts over many
texts, so the expectation is about right for a batch of unrelated requests; the tokens of one prompt are more alike,
touch fewer experts and crowd them more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Experts:
    """A layer's experts: how many, how many each token goes through, and the (columns, inner) of one's products."""

    count: int
    per_token: int
    operators: tuple[tuple[int, int], ...]

    @property
    def weights(self) -> int:
        """Elements of one expert."""
        return sum(columns * inner for columns, inner in self.operators)

    def touched(self, tokens: Any) -> Any:
        """How many experts at least one of so many tokens goes through, in expectation. A number or an array."""
        return self.count * (1 - (1 - self.per_token / self.count) ** tokens)
