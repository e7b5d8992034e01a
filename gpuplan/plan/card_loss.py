"""Plans that meet demand after the loss of any one card.

What stands on which card matters here, and a programme with every card by itself is slow: equal cards can be swapped in
many ways. So for each number of cards N, from two on, a programme without single cards is solved first. Whatever N
cards survive, the capacities of a model sum to N / (N - 1) of its demand, for the mean card takes 1 / N with it; so its
cost is a bound, and where its replicas can be spread over its cards evenly enough, it is a plan. Only where they cannot
are the N cards taken one by one. More cards are tried until even the bound for N or more of them costs what the best
does.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from gpuplan.plan import cards
from gpuplan.plan.cutting import Chosen, Column, Cutting, Prices, columns
from gpuplan.plan.packing_terms import CardUsed, Question
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


def cheapest(question: Question, prices: Prices, limits: Limits, preferred: Preferred) -> Found:
    """The cheapest plan of any number of cards."""
    until_s = time.perf_counter() + limits.seconds
    best = Found("infeasible", (), math.inf, math.inf)
    most = sum(math.inf if k.count_max is None else k.count_max for k in question.kinds)
    proven, count, lowest = True, 2, math.inf
    while count <= most:
        left = replace(limits, seconds=until_s - time.perf_counter())
        bound = _bound(question, prices, left, (count, most), 1.0)
        if bound >= best.cost or bound == math.inf:
            break
        if left.seconds <= 0:
            proven, lowest = False, min(lowest, bound)
            break
        found = _of(question, prices, left, preferred, count, best.cost)
        proven = proven and found.status != "unknown" and (found.status != "feasible")
        lowest = min(lowest, found.bound)
        best = min(best, found, key=lambda one: one.cost)
        count += 1
    if not best.cards:
        return replace(best, status="infeasible" if proven else "unknown")
    return replace(
        best, status="optimal" if proven else "feasible", bound=best.cost if proven else min(lowest, best.cost)
    )


def on_fixed(question: Question, prices: Prices, limits: Limits, preferred: Preferred, count: int) -> Found:
    """A plan on exactly these cards."""
    return _of(question, prices, limits, preferred, count, math.inf)


def _bound(question: Question, prices: Prices, limits: Limits, count: tuple[float, float], slack: float) -> float:
    programme = Cutting(question, prices, cards=count, slack=slack)
    solved = programme.minimise(programme.cost(), limits)
    return math.inf if solved.status == "infeasible" else max(prices.at_least(max(solved.bound, 0.0)), 0)


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
    if bound >= cost_below:
        return Found("infeasible", (), math.inf, bound)
    if solved.found:
        cost = round(solved.objective)
        for chosen in (preferred(question, prices, cost, (count, count), slack), programme.chosen(solved)):
            if chosen is not None:
                spread = cards.cards_of(question, chosen)
                if cards.survives_card(question, spread):
                    return Found("optimal" if solved.status == "optimal" else "feasible", spread, cost, bound)
    return _one_by_one(question, prices, limits, count, bound)


def _one_by_one(question: Question, prices: Prices, limits: Limits, count: int, bound: float) -> Found:
    best = question.best()
    programme = Programme()
    shapes: list[Column] = [c for kind in range(len(question.kinds)) for c in columns(question, kind, best)]
    cuts = [[programme.variable(0, 1) for _ in shapes] for _ in range(count)]
    placed = [{slot: programme.variable() for slot in best} for _ in range(count)]
    for card in range(count):
        programme.row(dict.fromkeys(cuts[card], 1.0), 1.0, 1.0)
        for kind in {c.kind for c in shapes}:
            name = question.kinds[kind].gpu.name
            for profile in {slot[1] for slot in best if slot[0] == name}:
                there = {
                    v: float(c.layout.count(profile))
                    for v, c in zip(cuts[card], shapes, strict=True)
                    if c.kind == kind and profile in c.layout
                }
                used = {v: -1.0 for slot, v in placed[card].items() if slot[:2] == (name, profile)}
                programme.row({**there, **used}, 0.0)
        if card:  # equal cards in one order only
            order = {v: float(i) for i, v in enumerate(cuts[card])}
            programme.row({**order, **{v: -float(i) for i, v in enumerate(cuts[card - 1])}}, 0.0)
    for i, kind_ in enumerate(question.kinds):
        if kind_.count_max is not None:
            programme.row(
                {v: 1.0 for row in cuts for v, c in zip(row, shapes, strict=True) if c.kind == i}, high=kind_.count_max
            )
    for model, demand in question.demands.items():
        programme.row({row[slot]: 1.0 for row in placed for slot in best if slot[2] == model}, 1.0)
        for lost in range(count) if demand > 0 else ():
            rest = [row for card, row in enumerate(placed) if card != lost]
            programme.row(
                {row[slot]: o.capacity_per_s / demand for row in rest for slot, o in best.items() if slot[2] == model},
                1.0,
            )
    costs = {v: float(prices.units[c.kind]) for row in cuts for v, c in zip(row, shapes, strict=True)}
    solved = programme.minimise(costs, limits)
    if not solved.found:
        return Found(solved.status, (), math.inf, math.inf if solved.status == "infeasible" else bound)
    chosen = []
    for row, on in zip(cuts, placed, strict=True):
        (shape,) = (c for v, c in zip(row, shapes, strict=True) if round(solved.values[v]))
        replicas = Counter({slot: round(solved.values[v]) for slot, v in on.items()})
        chosen.append((shape.kind, shape.layout, +replicas))
    return Found(
        solved.status,
        cards.cards_as(question, chosen),
        round(solved.objective),
        max(bound, prices.at_least(max(solved.bound, 0.0))),
    )
