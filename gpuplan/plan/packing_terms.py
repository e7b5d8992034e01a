"""What `packing.pack` is asked and what it answers: a `Question` of kinds of cards, demands and options, a `Packing` of
concrete cards with placed slices.

A slice, the uncut card included, holds one model, in one or more processes that share it by MPS. Different models never
share a slice: no table here says what they would take from each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gpuplan.hardware import mig
from gpuplan.hardware.catalog import Gpu


@dataclass(frozen=True, slots=True)
class CardKind:
    """Cards of one kind that can be had, each at `price_per_hour` ($), at most `count_max` of them, cut in any way or
    as one of the layouts in `only`."""

    gpu: Gpu
    price_per_hour: float
    count_max: int | None = None
    only: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.price_per_hour < math.inf:
            raise ValueError(f"a card has a price above 0 $/h, got {self.price_per_hour}")

    @property
    def layouts(self) -> tuple[tuple[str, ...], ...]:
        """The layouts that such a card may get."""
        return self.only or layouts_of(self.gpu)


@dataclass(frozen=True, slots=True)
class Option:
    """One model on one slice of one kind of card: its processes together serve `capacity_per_s` requests a second.

    `profile` is a name of the card's own table, or `whole`.
    """

    model: str
    gpu: str
    profile: str
    capacity_per_s: float
    processes: int = 1
    batch_size: int | None = None


@dataclass(frozen=True, slots=True)
class Present:
    """An instance that is there: the profile's name, its first memory cell, and the model it serves if any."""

    profile: str
    start: int
    model: str | None = None


@dataclass(frozen=True, slots=True)
class PresentCard:
    """A card that is there and how it is cut; no instances: not at all."""

    gpu: str
    instances: tuple[Present, ...] = ()


Loss = Literal["card", "replica"]
Preference = Literal["headroom", "free"]


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be served, on what. `demands` are requests per second by model; each gets a replica even at 0.

    Raises ValueError for a demand that is no rate, for two kinds of the same card, and for cards that are `fixed` in
    unknown number.

    `survive`: demand is still met, and each model has a replica, after the loss of any one card, or of any one replica
    (a slice with its processes).
    `fixed`: the `count_max` cards of every kind are there and paid for, so the question is how to cut them.
    `current`: cards that are there. Which of them a plan keeps is for it to say. Where a card's loss must be survived,
    layouts are chosen without looking at them, and then matched to them as well as can be.
    `prefer`: what to do with the room that the cheapest plan has left, to let all demands grow by the same factor, or
    to leave as much of the cards free as possible, gathered on few of them.
    """

    demands: Mapping[str, float]
    kinds: Sequence[CardKind]
    options: Sequence[Option]
    survive: Loss | None = None
    fixed: bool = False
    current: Sequence[PresentCard] = ()
    prefer: Preference = "headroom"

    def __post_init__(self) -> None:
        if not all(0 <= demand < math.inf for demand in self.demands.values()):
            raise ValueError(f"demands are requests per second, got {dict(self.demands)}")
        if len({kind.gpu.name for kind in self.kinds}) < len(self.kinds):
            raise ValueError("every kind of card once, at one price")
        if self.fixed and any(kind.count_max is None for kind in self.kinds):
            raise ValueError("fixed cards have a number")

    def best(self) -> dict[tuple[str, str, str], Option]:
        """By (card, profile, model) the option with most capacity; of equal ones the fewest processes, the smallest
        batch. No plan gains from the others."""
        layouts = {kind.gpu.name: {p for layout in kind.layouts for p in layout} for kind in self.kinds}
        found: dict[tuple[str, str, str], Option] = {}
        for o in sorted(self.options, key=lambda o: (-o.capacity_per_s, o.processes, o.batch_size or 0)):
            if o.capacity_per_s > 0 and o.model in self.demands and o.profile in layouts.get(o.gpu, ()):
                found.setdefault((o.gpu, o.profile, o.model), o)
        return found


@dataclass(frozen=True, slots=True)
class SliceUsed:
    """A slice at its place, what runs there (None: it is free), and the requests per second it is expected to get.

    `kept`: the instance was there before.
    """

    placement: mig.Placement
    option: Option | None = None
    load_per_s: float = 0.0
    kept: bool = False


@dataclass(frozen=True, slots=True)
class CardUsed:
    """A card and its slices in an order in which the driver can create them. `current` is its place among the cards
    that are there, None for a new one."""

    kind: CardKind
    slices: tuple[SliceUsed, ...]
    current: int | None = None

    @property
    def layout(self) -> tuple[str, ...]:
        return tuple(s.placement.profile.name for s in self.slices)


@dataclass(frozen=True, slots=True)
class Packing:
    """The answer. Costs are in $/h.

    `status`: optimal, where no plan costs less; feasible, where a limit came before the proof; not possible, with the
    reason in `why`; unknown, where a limit came before any plan.
    `lp_bound_per_hour` is the least cost if cards could be bought in fractions; `bound_per_hour` what is proven.
    `growth` is the factor by which all demands could grow on these cards as they are cut.
    `destroyed` counts instances of `current` that are no more. Of the `elapsed_s` it took, the cost was settled after
    `proof_s`; where cards are fixed or one's loss must be survived, no such part is told apart.
    """

    status: Literal["optimal", "feasible", "not possible", "unknown"]
    cards: tuple[CardUsed, ...] = ()
    cost_per_hour: float = math.inf
    lp_bound_per_hour: float = 0.0
    bound_per_hour: float = 0.0
    growth: float = 0.0
    destroyed: int = 0
    elapsed_s: float = 0.0
    proof_s: float = 0.0
    why: str = ""

    @property
    def proven_optimal(self) -> bool:
        return self.status == "optimal"

    @property
    def gap(self) -> float:
        """The share of the cost that is not proven to be needed."""
        return (self.cost_per_hour - self.bound_per_hour) / self.cost_per_hour if self.cards else math.inf

    @property
    def sentence(self) -> str:
        """The answer in a line."""
        if not self.cards:
            return f"{self.status}: {self.why}"
        costs = f"cost {self.cost_per_hour:.2f} $/h"
        if self.proven_optimal:
            return f"{costs}, no plan can cost less (proven optimal)"
        return f"{costs}, no plan can cost less than {self.bound_per_hour:.2f} (gap {self.gap:.0%})"

    def capacities(self) -> dict[str, float]:
        """Requests per second that the replicas of each model can serve together."""
        found: dict[str, float] = {}
        for option in (s.option for card in self.cards for s in card.slices):
            if option is not None:
                found[option.model] = found.get(option.model, 0.0) + option.capacity_per_s
        return found


def layouts_of(gpu: Gpu) -> tuple[tuple[str, ...], ...]:
    """The uncut card, then every MIG layout to which no slice can be added."""
    return ((mig.WHOLE,), *mig.maximal_layouts(gpu))
