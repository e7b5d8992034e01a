"""Plans that meet demand after the loss of any one card.

What stands on which card matters here, and a programme with every card by itself is slow: equal cards can be swapped in
many ways. So for each number of cards N, from two on, a programme without single cards is solved first. In a plan that
survives, the capacities of a model sum to at least N / (N - 1) of its demand, for the mean card takes 1 / N with it; so
the cost of that programme is a bound, and where its replicas can be spread over its cards evenly enough, it is a plan.
Where they cannot, its layouts are kept and replicas chosen anew, and where that fails too, everything is chosen anew,
card by card. More cards are tried until even the bound for N or more of them costs what the best does.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from gpuplan.plan import cards
from gpuplan.plan.cutting import NOISE, Chosen, Column, Cutting, Prices, Slot, columns, rounded
from gpuplan.plan.packing_terms import CardUsed, Option, Question
from gpuplan.plan.programme import Limits, Programme, Status

Preferred = Callable[[Question, Prices, float, tuple[float, float], float], Chosen | None]
"""Of the plans for a question, prices, cost in units, numbers of cards and slack the one preferred."""


@dataclass(frozen=True, slots=True)
class Found:
    """`bound` is in units of `Prices`."""

    status: Status
    cards: tuple[CardUsed, ...]
    cost: float
    bound: float


SHARE = 0.25
"""Of the time that is left, what each step for one number of cards may take."""


def cheapest(question: Question, prices: Prices, limits: Limits, preferred: Preferred) -> Found:
    """The cheapest plan of any number of cards."""
    until_s = time.perf_counter() + limits.seconds
    most = sum(math.inf if k.count_max is None else k.count_max for k in question.kinds)
    least = _bound(question, prices, (2, most))
    best = Found("infeasible", (), math.inf, math.inf)
    if least == math.inf:
        return best
    count, lowest = max(2, math.ceil(_fewest(question, prices) - NOISE)), math.inf
    while count <= most:
        bound = max(least, _bound(question, prices, (count, most)))
        left_s = until_s - time.perf_counter()
        if bound >= best.cost or left_s <= 0:
            lowest = min(lowest, bound)
            break
        found = _of(question, prices, replace(limits, seconds=left_s * SHARE), preferred, count, best.cost)
        lowest = min(lowest, max(found.bound, bound))
        best = min(best, found, key=lambda one: one.cost)
        count += 1
    if not best.cards:
        return replace(best, status="infeasible" if lowest == math.inf else "unknown")
    bound = min(lowest, best.cost)
    return replace(best, status="optimal" if bound >= best.cost else "feasible", bound=bound)


def _bound(question: Question, prices: Prices, count: tuple[float, float]) -> float:
    """What so many cards cost at least; infinity where they cannot meet the demand."""
    lp = Cutting(question, prices, cards=count).relaxed()
    return math.inf if lp == math.inf else prices.at_least(lp)


def _fewest(question: Question, prices: Prices) -> float:
    programme = Cutting(question, prices)
    return programme.programme.relaxed(dict.fromkeys(programme.columns, 1.0))


def on_fixed(question: Question, prices: Prices, limits: Limits, preferred: Preferred, count: int) -> Found:
    """A plan on exactly these cards."""
    return _of(question, prices, limits, preferred, count, math.inf)


def _of(
    question: Question, prices: Prices, limits: Limits, preferred: Preferred, count: int, cost_below: float
) -> Found:
    """The cheapest plan of `count` cards if it costs less than that."""
    slack = count / (count - 1)
    programme = Cutting(question, prices, cards=(count, count), slack=slack)
    solved = programme.minimise(programme.cost(), limits)
    if solved.status == "infeasible":
        return Found("infeasible", (), math.inf, math.inf)
    bound = prices.at_least(max(solved.bound, 0.0))
    if not solved.found:
        return Found("unknown", (), math.inf, bound)
    if bound >= cost_below:
        return Found("infeasible", (), math.inf, bound)
    single, cost = _OneByOne(question, prices, count), round(solved.objective)
    tried = [preferred(question, prices, cost, (count, count), slack), programme.chosen(solved)]
    for chosen in filter(None, tried):
        spread = cards.cards_of(question, chosen)
        if not cards.survives_card(question, spread):
            spread = single.solved(limits, chosen).cards
        if spread:
            return Found("optimal" if solved.status == "optimal" else "feasible", spread, cost, bound)
    found = single.solved(limits)
    return found if found.status == "infeasible" else replace(found, bound=max(bound, found.bound))


class _OneByOne:
    """The programme in which each of `count` cards has a layout and replicas of its own."""

    def __init__(self, question: Question, prices: Prices, count: int) -> None:
        self._question, self._prices, self._best = question, prices, question.best()
        self._columns = [c for kind in range(len(question.kinds)) for c in columns(question, kind, self._best)]
        self._count = count

    def solved(self, limits: Limits, layouts: Chosen | None = None) -> Found:
        """The cheapest plan, with these layouts or any."""
        question, programme = self._question, Programme()
        fixed = [key for key, n in sorted(layouts.layouts.items()) for _ in range(n)] if layouts else []
        cuts: list[dict[int, Column]] = []
        for card in range(self._count):
            shapes = [Column(*fixed[card])] if fixed else self._columns
            cuts.append({programme.variable(1 if fixed else 0, 1): shape for shape in shapes})
        placed = [{slot: programme.variable() for slot in self._best} for _ in cuts]
        self._of_cards(programme, cuts, placed)
        for model, demand in question.demands.items():
            mine = {slot: option for slot, option in self._best.items() if slot[2] == model}
            _of_loss(programme, placed, mine, demand, whole=not fixed)
        costs = {v: float(self._prices.units[c.kind]) for row in cuts for v, c in row.items()}
        solution = programme.minimise(costs, limits)
        if not solution.found:
            return Found(solution.status, (), math.inf, math.inf if solution.status == "infeasible" else 0.0)
        chosen = []
        for row, on in zip(cuts, placed, strict=True):
            (shape,) = (c for v, c in row.items() if round(solution.values[v]))
            chosen.append((shape.kind, shape.layout, +Counter({s: round(solution.values[v]) for s, v in on.items()})))
        bound = self._prices.at_least(max(solution.bound, 0.0))
        return Found(solution.status, cards.cards_as(question, chosen), round(solution.objective), bound)

    def _of_cards(
        self, programme: Programme, cuts: Sequence[Mapping[int, Column]], placed: Sequence[Mapping[Slot, int]]
    ) -> None:
        for row, on in zip(cuts, placed, strict=True):
            programme.row(dict.fromkeys(row, 1.0), 1.0, 1.0)
            for gpu, profile in sorted({slot[:2] for slot in self._best}):
                there = {
                    v: float(c.layout.count(profile))
                    for v, c in row.items()
                    if self._question.kinds[c.kind].gpu.name == gpu
                }
                programme.row({**there, **{v: -1.0 for s, v in on.items() if s[:2] == (gpu, profile)}}, 0.0)
        if all(len(row) > 1 for row in cuts):  # equal cards in one order only
            for one, other in itertools.pairwise(cuts):
                later = {v: float(i) for i, v in enumerate(other)}
                programme.row({**later, **{v: -float(i) for i, v in enumerate(one)}}, 0.0)
        for i, kind in enumerate(self._question.kinds):
            if kind.count_max is not None:
                programme.row({v: 1.0 for row in cuts for v, c in row.items() if c.kind == i}, high=kind.count_max)


def _of_loss(
    programme: Programme,
    placed: Sequence[Mapping[Slot, int]],
    mine: Mapping[Slot, Option],
    demand: float,
    *,
    whole: bool,
) -> None:
    """The demand for a model is met without each of the cards, by one replica where there is none."""
    shares = {slot: option.capacity_per_s / demand if demand > 0 else 1.0 for slot, option in mine.items()}
    for lost in range(len(placed)):
        rest = [row for card, row in enumerate(placed) if card != lost]
        programme.row({row[slot]: share for row in rest for slot, share in shares.items()}, 1.0)
        for values, least in rounded(shares) if whole else ():
            programme.row({row[slot]: value for row in rest for slot, value in values.items()}, least)
