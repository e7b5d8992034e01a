"""The integer programme of packing, as cutting stock: cards are cut into layouts, replicas stand on the slices.

Variables: how many cards of each kind have each layout, and how many replicas of each model stand on each profile.

    minimise   what the cards cost
    such that  replicas on a profile <= slices of it in the chosen layouts,
               capacity of a model's replicas >= its demand, and at least one replica of each.

Which card a replica stands on is left open: any of equal slices will do, and `cards.py` chooses. Only the loss of a
card looks at cards one by one (`card_loss.py`).

Capacity rows alone are weak: a bit of a large slice meets a small demand. So each comes with rounded rows (Chvatal and
Gomory): dividing it by some capacity and rounding every number up leaves it valid where replicas are whole, since none
is negative. Costs are counted in whole units of the largest money that every price is a multiple of, by which a bound
is rounded up too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TypeVar

from gpuplan.hardware import mig
from gpuplan.plan.packing_terms import Option, Question
from gpuplan.plan.programme import Limits, Programme, Solution

ROUNDINGS = (1, 2, 3)
"""Each capacity divided by these is a divisor of a rounded row."""
NOISE = 1e-6
"""The share of a demand that is not looked at: the solver's own tolerance."""

Key = TypeVar("Key", bound=Hashable)
Slot = tuple[str, str, str]
"""Card, profile, model."""


@dataclass(frozen=True, slots=True)
class Column:
    """Cards of the question's kind `kind` that get `layout`: new ones, or those of the `state`th way that cards are cut
    now, of whose instances `kept` stay."""

    kind: int
    layout: tuple[str, ...]
    state: int | None = None
    kept: int = 0


@dataclass(frozen=True, slots=True)
class States:
    """Columns for cards that are there, how many cards there are of each state, and how many instances serve each model
    now, by slot."""

    columns: Sequence[Column] = ()
    counts: Mapping[int, int] = field(default_factory=dict)
    serving: Mapping[Slot, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chosen:
    """Layouts by (kind, layout) and replicas by slot, with how many of each."""

    layouts: Mapping[tuple[int, tuple[str, ...]], int]
    replicas: Mapping[Slot, int]


class Prices:
    """Prices in whole units of `unit` $/h."""

    def __init__(self, question: Question) -> None:
        exact = [Fraction(str(kind.price_per_hour)).limit_denominator(10**6) for kind in question.kinds]
        scale = math.lcm(*(price.denominator for price in exact))
        whole = [int(price * scale) for price in exact]
        common = math.gcd(*whole)
        self.unit = common / scale
        self.units = [price // common for price in whole]

    def at_least(self, units: float) -> int:
        """The least cost in whole units that is not below a bound found in floating point."""
        return math.ceil(units - 1e-5 * max(1.0, abs(units)))


class Cutting:
    """The programme for a question.

    `growth` are the limits between which all demands are multiplied. `cards` are the limits of the number of cards, and
    `slack` multiplies what capacities have to sum to (the loss of a card asks for more than the demand). `cost_max` is
    in units of `Prices`. What goes of what is there, as `disturbed` counts it, is at most `disturbed_max`.
    """

    def __init__(
        self,
        question: Question,
        prices: Prices,
        *,
        growth: tuple[float, float] = (1.0, 1.0),
        cards: tuple[float, float] = (0, math.inf),
        slack: float = 1.0,
        cost_max: float = math.inf,
        states: States = States(),
        disturbed_max: float = math.inf,
    ) -> None:
        self._question, self._prices = question, prices
        self._best = question.best()
        self.programme = Programme()
        self.growth = self.programme.variable(*growth, integer=False)
        plain = [c for kind in range(len(question.kinds)) for c in columns(question, kind, self._best)]
        self.columns = {self.programme.variable(): column for column in [*plain, *states.columns]}
        self.replicas = {slot: self.programme.variable() for slot in self._best}
        self._disturbed = self._of_what_is_there(states)
        if disturbed_max < math.inf:
            self.programme.row(self._disturbed, high=disturbed_max)
        self._of_cards(cards, cost_max)
        self._of_slices()
        most = min(cards[1], *([cost_max // min(prices.units)] if cost_max < math.inf else []), math.inf)
        for model, demand in question.demands.items():
            mine = {slot: option for slot, option in self._best.items() if slot[2] == model}
            self.programme.row({self.replicas[slot]: 1.0 for slot in mine}, 1.0 if question.survive is None else 2.0)
            if demand > 0:
                self._of_capacity(mine, demand, slack, whole=growth[0] >= 1)
                if question.survive is not None:
                    self._of_loss(mine, demand, slack, most if growth[1] > 1 else math.inf)

    def cost(self) -> dict[int, float]:
        """What to minimise for the cost in units of `Prices`."""
        return {v: float(self._prices.units[c.kind]) for v, c in self.columns.items()}

    def disturbed(self) -> dict[int, float]:
        """What to minimise for the fewest instances that go, with those of cards that are given back, and among equals
        for the fewest replicas that move. It counts what stays, below zero, and replicas by profile."""
        return self._disturbed

    def occupied(self) -> dict[int, float]:
        """What to minimise for the share of the cards' memory cells in use, in cards."""
        widths: dict[tuple[str, str], float] = {}
        for kind in self._question.kinds:
            for name in {p for layout in kind.layouts for p in layout}:
                part = mig.part(kind.gpu, name)
                widths[(kind.gpu.name, name)] = part.width / part.cells
        return {v: widths[slot[:2]] for slot, v in self.replicas.items()}

    def chosen(self, solution: Solution) -> Chosen:
        """What a solution says, in whole cards and replicas."""
        layouts: Counter[tuple[int, tuple[str, ...]]] = Counter()
        for variable, column in self.columns.items():
            layouts[(column.kind, column.layout)] += round(solution.values[variable])
        replicas = {slot: round(solution.values[v]) for slot, v in self.replicas.items()}
        return Chosen(+layouts, {slot: n for slot, n in replicas.items() if n})

    def relaxed(self) -> float:
        """The least cost in units of `Prices` if cards and replicas could be had in fractions."""
        return self.programme.relaxed(self.cost())

    def minimise(self, costs: Mapping[int, float], limits: Limits) -> Solution:
        """The best solution within the limits."""
        return self.programme.minimise(costs, limits)

    def _of_cards(self, cards: tuple[float, float], cost_max: float) -> None:
        everything = dict.fromkeys(self.columns, 1.0)
        if cards != (0, math.inf):
            self.programme.row(everything, *cards)
        if cost_max < math.inf:
            self.programme.row(self.cost(), high=cost_max)
        for i, kind in enumerate(self._question.kinds):
            if kind.count_max is not None:
                self.programme.row({v: 1.0 for v, c in self.columns.items() if c.kind == i}, high=kind.count_max)

    def _of_what_is_there(self, states: States) -> dict[int, float]:
        for state, count in states.counts.items():
            self.programme.row({v: 1.0 for v, c in self.columns.items() if c.state == state}, high=count)
        staying = {}
        for slot, count in states.serving.items():
            if slot in self.replicas:
                staying[self.programme.variable(0, count)] = -1.0
                self.programme.row({max(staying): 1.0, self.replicas[slot]: -1.0}, high=0.0)
        instance = 1.0 + sum(states.serving.values())
        return {**{v: -instance * c.kept for v, c in self.columns.items() if c.kept}, **staying}

    def _of_slices(self) -> None:
        for i, kind in enumerate(self._question.kinds):
            for profile in sorted({slot[1] for slot in self._best if slot[0] == kind.gpu.name}):
                row = {v: float(c.layout.count(profile)) for v, c in self.columns.items() if c.kind == i}
                used = {v: -1.0 for slot, v in self.replicas.items() if slot[:2] == (kind.gpu.name, profile)}
                self.programme.row({**{v: n for v, n in row.items() if n}, **used}, 0.0)

    def _of_capacity(self, mine: Mapping[Slot, Option], demand: float, slack: float, *, whole: bool) -> None:
        shares = {self.replicas[slot]: option.capacity_per_s / (demand * slack) for slot, option in mine.items()}
        self.programme.row({**shares, self.growth: -1.0}, 0.0)
        if whole:  # whole replicas: one that serves more than is asked does it all, and no fraction of one does
            capped = {v: min(share, 1.0) for v, share in shares.items()}
            self.programme.row(capped, 1.0)
            for row, least in rounded(capped):
                self.programme.row(row, least)

    def _of_loss(self, mine: Mapping[Slot, Option], demand: float, slack: float, cards_max: float) -> None:
        """Demand is met without any one replica, so without one on each profile that is used at all.

        More than what meets the demand and one more is never needed on a profile, so a plan has no more of them; where
        headroom is looked for, as many as `cards_max` cards have slices.
        """
        shares = {self.replicas[slot]: option.capacity_per_s / demand for slot, option in mine.items()}
        for slot, option in mine.items():
            at_most = math.ceil(demand * slack / option.capacity_per_s) + 1.0
            if cards_max < math.inf:
                at_most = cards_max * max(c.layout.count(slot[1]) for c in self.columns.values())
            used = self.programme.variable(0, 1)
            self.programme.row({self.replicas[slot]: 1.0, used: -at_most}, high=0.0)
            lost = option.capacity_per_s / demand
            self.programme.row({**shares, used: -lost}, 1.0)
            for row, least in rounded({**shares, used: -lost}):
                self.programme.row(row, least)


def columns(question: Question, kind: int, best: Mapping[Slot, Option]) -> Iterator[Column]:
    """New cards of a kind: of its layouts that differ in slices with any option, those contained in no other."""
    gpu = question.kinds[kind].gpu
    usable = {profile for card, profile, _ in best if card == gpu.name}
    by_slices = {
        frozenset(Counter(p for p in layout if p in usable).items()): layout
        for layout in reversed(question.kinds[kind].layouts)
    }
    slices = [Counter(dict(key)) for key in by_slices if key]
    for key, layout in by_slices.items():
        if key and not any(Counter(dict(key)) < other for other in slices):
            yield Column(kind, layout)


def rounded(row: Mapping[Key, float]) -> Iterator[tuple[dict[Key, float], float]]:
    """Rows that follow in whole numbers from `sum of value * number >= 1`, the numbers being none below zero."""
    for divisor in sorted({value / n for value in row.values() if value > 0 for n in ROUNDINGS}):
        yield {key: float(_up(value / divisor)) for key, value in row.items()}, float(_up(1 / divisor))


def _up(value: float) -> int:
    return math.ceil(value - NOISE)
