"""Which layouts to try, and which model on which slice.

`candidates` gives, for a number of equal cards, every layout to which no slice can be added (any other is contained
in one of these, so nothing is missed) with its best assignments of models to slices, ranked by the busiest model's
expected load. `equal_cards.cards_needed_min` is the other side: a bound that no plan can beat, as long as no replica
serves more than its capacity.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gpuplan.hardware.catalog import Gpu
from gpuplan.plan.equal_cards import Capacities, most_headroom
from gpuplan.plan.packing_terms import layouts_of
from gpuplan.scenario.demand import ReplicaSpec

ASSIGNMENTS_MAX = 3_000
"""Enumerated per layout; where there are more, an integer programme finds one that is near the best. Some hundredths of
a second's work either way."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Cards of one layout and the replicas on them. `load` is the busiest model's demand over its capacity."""

    profiles: tuple[str, ...]
    replicas: tuple[ReplicaSpec, ...]
    load: float


def candidates(
    card: Gpu, count: int, demands: Mapping[str, float], capacities: Capacities, *, best: int
) -> dict[tuple[str, ...], list[Candidate]]:
    """For each layout its `best` assignments by load; an empty list where some model has no slice to go to."""
    return {
        layout: sorted(_assignments(card, layout, count, demands, capacities), key=lambda c: c.load)[:best]
        for layout in layouts_of(card)
    }


def _assignments(
    card: Gpu, layout: tuple[str, ...], count: int, demands: Mapping[str, float], capacities: Capacities
) -> Iterator[Candidate]:
    kinds = {name: n * count for name, n in Counter(layout).items()}
    fitting = {name: [model for model in demands if (model, name) in capacities] for name in kinds}
    ways = math.prod(math.comb(n + len(fitting[name]) - 1, n) for name, n in kinds.items() if fitting[name])
    if ways > ASSIGNMENTS_MAX:
        chosen = most_headroom(card, layout, count, demands, capacities)
        if chosen is not None:
            splits = [{model: n for (model, profile), n in chosen.items() if profile == name} for name in kinds]
            yield _candidate(layout, list(kinds), splits, demands, capacities)
        return
    splits_by_kind = [
        [dict(zip(fitting[name], split, strict=True)) for split in _splits(n, len(fitting[name]))] or [{}]
        for name, n in kinds.items()
    ]
    for combination in itertools.product(*splits_by_kind):
        if all(any(split.get(model) for split in combination) for model in demands):
            yield _candidate(layout, list(kinds), list(combination), demands, capacities)


def _candidate(
    layout: tuple[str, ...],
    kinds: list[str],
    splits: list[dict[str, int]],
    demands: Mapping[str, float],
    capacities: Capacities,
) -> Candidate:
    loads = {
        model: rate
        / sum(
            split.get(model, 0) * capacities.get((model, kind), 0.0) for kind, split in zip(kinds, splits, strict=True)
        )
        for model, rate in demands.items()
    }
    replicas = tuple(
        ReplicaSpec(model=model, slice=kind, count=n)
        for kind, split in zip(kinds, splits, strict=True)
        for model, n in split.items()
        if n
    )
    return Candidate(layout, replicas, max(loads.values()))


def _splits(n: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to give `n` equal slices to `parts` models."""
    if parts == 0:
        return
    for bars in itertools.combinations(range(n + parts - 1), parts - 1):
        edges = (-1, *bars, n + parts - 1)
        yield tuple(b - a - 1 for a, b in itertools.pairwise(edges))
