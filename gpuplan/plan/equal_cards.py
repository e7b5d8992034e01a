"""The integer programme for equal cards, as the search over layouts asks it: how few, and who goes where.

Takes capacities in requests per second by (model, profile name), a pair that is missing does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from gpuplan.hardware.catalog import Gpu
from gpuplan.plan import impossible
from gpuplan.plan.cutting import Cutting, Prices
from gpuplan.plan.packing_terms import CardKind, Option, Question
from gpuplan.plan.programme import Limits

Capacities = Mapping[tuple[str, str], float]

HEADROOM = Limits(seconds=2.0, gap=0.02, nodes=50)
"""Near enough for what is simulated next. Nodes end it, and so alike on every machine, unless seconds have to."""
SLICES = 0.01
"""What the capacity of all slices is worth against the headroom of the busiest model: none is left without a use."""


def cards_needed_min(gpu: Gpu, demands: Mapping[str, float], capacities: Capacities) -> int | None:
    """The fewest cards that could carry the demand by capacity alone, whatever their layouts; None when a model fits on
    no slice.

    Where the proof takes longer than the solver's limits, the number proven so far.
    """
    question = _question(CardKind(gpu, 1.0), demands, capacities)
    if impossible.at_once(question):
        return None
    prices = Prices(question)
    programme = Cutting(question, prices)
    return prices.at_least(max(programme.relaxed(), programme.minimise(programme.cost(), Limits()).bound))


def most_headroom(
    gpu: Gpu, layout: tuple[str, ...], count: int, demands: Mapping[str, float], capacities: Capacities
) -> dict[tuple[str, str], int] | None:
    """How many replicas of each (model, profile) let all demands grow by the largest factor on `count` cards of this
    layout, which may be a factor below 1; None when some model gets no slice."""
    question = _question(CardKind(gpu, 1.0, only=(layout,)), demands, capacities)
    if impossible.at_once(question):
        return None
    prices = Prices(question)
    free = Cutting(question, prices, growth=(0.0, math.inf), cards=(count, count))
    most = -free.programme.relaxed({free.growth: -1.0}) if any(demands.values()) else 1.0
    if most == -math.inf:
        return None
    programme = Cutting(question, prices, growth=(0.0, most * 1.001), cards=(count, count))
    worth = {
        programme.replicas[slot]: -SLICES * option.capacity_per_s / demands[slot[2]] / len(demands)
        for slot, option in question.best().items()
        if demands[slot[2]] > 0
    }
    solved = programme.minimise({**worth, programme.growth: -1.0}, HEADROOM)
    if not solved.found:
        return None
    return {(model, profile): n for (_, profile, model), n in programme.chosen(solved).replicas.items()}


def _question(kind: CardKind, demands: Mapping[str, float], capacities: Capacities) -> Question:
    options = [Option(model, kind.gpu.name, profile, capacity) for (model, profile), capacity in capacities.items()]
    return Question(demands, [kind], options)
