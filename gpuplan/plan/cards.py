"""From numbers of layouts and replicas to concrete cards: which card that is there gets which layout, where each slice
stands, and which replica is on it.

Cards that are there are matched to the layouts so that the fewest instances go, and a layout is placed so that what can
stay does. Replicas stay on instances that served their model. The others, those that their model can spare least first,
go to the card that has least of their model, then least to do, so that a lost card takes little of any one model. Where
room is to be left free, they go to the fullest card. Every replica of a model gets the same utilisation: its share of
the demand is its share of the capacity.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cache

from gpuplan.hardware import mig
from gpuplan.hardware.catalog import Gpu
from gpuplan.plan.cutting import NOISE, Chosen, Slot
from gpuplan.plan.packing_terms import CardUsed, Option, Present, PresentCard, Question, SliceUsed

Layout = tuple[str, ...]


def instances_of(gpu: Gpu, card: PresentCard) -> tuple[tuple[str, int], ...]:
    """The (profile, start) of what is there, in the table's names. Raises InputError for a profile it does not have."""
    return tuple(sorted((mig.profile(gpu, i.profile, key="current").name, i.start) for i in card.instances))


@cache
def placed(gpu: Gpu, layout: Layout, there: tuple[tuple[str, int], ...] = ()) -> tuple[mig.Placement, ...]:
    """The layout's slices at their places, widest first, so that as many as possible are `there` already."""
    if layout == (mig.WHOLE,):
        return (mig.Placement(mig.whole(gpu), 0),)
    usual = mig.place(gpu, layout)
    if not there:
        return usual
    wanted, present = Counter(layout), set(there)
    found = max(
        (p for p in (usual, *_placements(gpu)) if Counter(one.profile.name for one in p) == wanted),
        key=lambda p: len(present & {(one.profile.name, one.start) for one in p}),
    )
    return tuple(sorted(found, key=lambda p: (-p.profile.width, -p.profile.slices, -p.start)))


@cache
def _placements(gpu: Gpu) -> tuple[tuple[mig.Placement, ...], ...]:
    return tuple(mig.placements_all(mig.plain_profiles(gpu)))


def kept(gpu: Gpu, layout: Layout, there: tuple[tuple[str, int], ...]) -> int:
    """How many of the instances that are there can stay when a card gets this layout."""
    return len(set(there) & {(p.profile.name, p.start) for p in placed(gpu, layout, there)})


def matched(question: Question, layouts: Sequence[tuple[int, Layout]]) -> list[int | None]:
    """For each card of a plan which card that is there it is, so that the most instances stay; None for a new one."""
    from scipy.optimize import linear_sum_assignment

    found: list[int | None] = [None] * len(layouts)
    for k, kind in enumerate(question.kinds):
        there = [i for i, card in enumerate(question.current) if card.gpu == kind.gpu.name]
        mine = [j for j, (of, _) in enumerate(layouts) if of == k]
        if there and mine:
            stays = [
                [kept(kind.gpu, layouts[j][1], instances_of(kind.gpu, question.current[i])) for i in there]
                for j in mine
            ]
            for a, b in zip(*linear_sum_assignment(stays, maximize=True), strict=True):
                found[mine[a]] = there[b]
    return found


def cards_of(question: Question, chosen: Chosen) -> tuple[CardUsed, ...]:
    """Concrete cards for what was chosen."""
    layouts = [key for key, n in sorted(chosen.layouts.items()) for _ in range(n)]
    places = _Places(question, layouts)
    places.fill(Counter(chosen.replicas), question.best())
    return places.cards()


def survives_card(question: Question, cards: Sequence[CardUsed]) -> bool:
    """Whether demand is still met, and every model still served, when any one of the cards is lost."""
    on = [_capacities(card) for card in cards]
    total: Counter[str] = Counter()
    for one in on:
        total.update(one)
    return all(
        total[model] > one[model] and total[model] - one[model] >= demand * (1 - NOISE)
        for one in on
        for model, demand in question.demands.items()
    )


def _capacities(card: CardUsed) -> Counter[str]:
    found: Counter[str] = Counter()
    for option in (s.option for s in card.slices if s.option):
        found.update({option.model: option.capacity_per_s})
    return found


def cards_as(question: Question, chosen: Sequence[tuple[int, Layout, Mapping[Slot, int]]]) -> tuple[CardUsed, ...]:
    """Concrete cards where it was chosen what runs on each."""
    places = _Places(question, [(kind, layout) for kind, layout, _ in chosen])
    for card, (_, _, replicas) in enumerate(chosen):
        places.fill(Counter(replicas), question.best(), only=card)
    return places.cards()


class _Places:
    """Cards of a plan with their slices, filled replica by replica."""

    def __init__(self, question: Question, layouts: Sequence[tuple[int, Layout]]) -> None:
        self._question = question
        self._kinds = [question.kinds[kind] for kind, _ in layouts]
        self._current = matched(question, layouts)
        self._there: list[dict[tuple[str, int], Present]] = []
        self._slices: list[list[mig.Placement]] = []
        for kind, i, (_, layout) in zip(self._kinds, self._current, layouts, strict=True):
            there = {} if i is None else self._instances(kind.gpu, question.current[i])
            self._there.append(there)
            self._slices.append(list(placed(kind.gpu, layout, tuple(sorted(there)))))
        self._on: dict[tuple[int, int], Option] = {}

    @staticmethod
    def _instances(gpu: Gpu, card: PresentCard) -> dict[tuple[str, int], Present]:
        return {(mig.profile(gpu, i.profile, key="current").name, i.start): i for i in card.instances}

    def fill(self, left: Counter[Slot], best: Mapping[Slot, Option], *, only: int | None = None) -> None:
        """Puts every replica on a free slice of its profile, of one card or any."""
        here = range(len(self._slices)) if only is None else (only,)
        free: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
        for card in here:
            for i, placement in enumerate(self._slices[card]):
                served = self._there[card].get((placement.profile.name, placement.start))
                slot = (self._kinds[card].gpu.name, placement.profile.name, (served and served.model) or "")
                if left[slot] > 0:
                    self._on[(card, i)] = best[slot]
                    left[slot] -= 1
                else:
                    free[slot[:2]].append((card, i))
        on: dict[tuple[int, str], float] = defaultdict(float)
        total: dict[str, float] = defaultdict(float)
        for (card, _), option in self._on.items():
            on[(card, option.model)] += option.capacity_per_s
            total[option.model] += option.capacity_per_s
        waiting = [slot for slot, n in left.items() for _ in range(n)]
        for slot in waiting:
            total[slot[2]] += best[slot].capacity_per_s
        spare = {model: max(total[model] - demand, NOISE) for model, demand in self._question.demands.items()}
        load = [0.0] * len(self._slices)
        waiting.sort(key=lambda slot: (-best[slot].capacity_per_s / spare[slot[2]], slot))
        for slot in waiting:
            places = free[slot[:2]]
            card, i = min(places, key=lambda at: self._wish(at, slot[2], on, load))
            places.remove((card, i))
            self._on[(card, i)] = best[slot]
            on[(card, slot[2])] += best[slot].capacity_per_s
            part = self._slices[card][i].profile
            load[card] += part.width / part.cells

    def _wish(
        self, at: tuple[int, int], model: str, on: Mapping[tuple[int, str], float], load: Sequence[float]
    ) -> tuple[float, ...]:
        card = at[0]
        if self._question.prefer == "free" and self._question.survive != "card":
            return (-load[card], *at)
        return (on.get((card, model), 0.0), load[card], *at)

    def cards(self) -> tuple[CardUsed, ...]:
        """What stands where, with the load expected of each replica."""
        total: dict[str, float] = defaultdict(float)
        for served in self._on.values():
            total[served.model] += served.capacity_per_s
        found = []
        for card, (kind, slices) in enumerate(zip(self._kinds, self._slices, strict=True)):
            rows = []
            for i, placement in enumerate(slices):
                option = self._on.get((card, i))
                share = option.capacity_per_s / total[option.model] if option else 0.0
                load = share * self._question.demands[option.model] if option else 0.0
                stays = (placement.profile.name, placement.start) in self._there[card]
                rows.append(SliceUsed(placement, option, load, stays))
            found.append(CardUsed(kind, tuple(rows), self._current[card]))
        return tuple(found)
