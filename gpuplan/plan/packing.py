"""Which cards, how each is cut, and what runs on each slice, so that every model's demand is met at least cost.

`pack` solves the integer programme of `cutting.py` and puts what it says on concrete cards. It simulates nothing: a
replica serves its option's capacity, so what is found is a bound for any plan with these capacities, and a plan itself
where the capacities were measured under the SLO.

Choices are made in this order, and each keeps what the one before it reached: least cost; fewest instances destroyed of
those that are there, then fewest replicas moved; then most headroom, or most of the cards left free. The first is
solved to a proof, or to a limit that the answer names. The rest may stop at a small gap or after some nodes: they are
preferences, and claim no proof.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gpuplan.hardware import mig
from gpuplan.plan import card_loss, cards, impossible
from gpuplan.plan.cutting import Chosen, Column, Cutting, Prices, States
from gpuplan.plan.packing_terms import CardUsed, Packing, Question
from gpuplan.plan.programme import Limits

PREFERENCE_GAP = 0.1
PREFERENCE_NODES = 10
PREFERENCE_SECONDS = 2.0
GROWTH_MAX = 1e6
ROOM = 0.01
"""What leaving a whole fleet free is worth against headroom, in shares of the demand: no replica is idle."""


def pack(question: Question, limits: Limits = Limits()) -> Packing:  # noqa: B008 (it is frozen)
    """The cheapest plan. `limits` hold for the proof of its cost.

    Raises InputError where `current` names a profile that its card does not have.
    """
    started_s = time.perf_counter()
    why = impossible.at_once(question)
    found = Packing("not possible", why=why) if why else _Search(question, limits).run()
    if found.status == "not possible" and not found.why:
        found = replace(found, why=impossible.by_trying(question, limits))
    elapsed_s = time.perf_counter() - started_s
    return replace(found, elapsed_s=elapsed_s, proof_s=found.proof_s or elapsed_s)


@dataclass(slots=True)
class _Search:
    question: Question
    limits: Limits

    def run(self) -> Packing:
        question = self.question
        prices = Prices(question)
        if question.fixed:
            units = sum(n * (k.count_max or 0) for n, k in zip(prices.units, question.kinds, strict=True))
            count = sum(k.count_max or 0 for k in question.kinds)
            return self._of_fixed(prices, units, count)
        started_s = time.perf_counter()
        programme = Cutting(question, prices)
        lp = programme.relaxed()
        if question.survive == "card":
            best = card_loss.cheapest(question, prices, self.limits, self._preferred)
            return self._answer(prices, best.status, best.cards, best.bound, lp)
        solved = programme.minimise(programme.cost(), self.limits)
        if not solved.found:
            return _nothing(solved.status, self.limits)
        proof_s = time.perf_counter() - started_s
        units = round(solved.objective)
        bound = min(units, max(prices.at_least(lp), prices.at_least(solved.bound)))
        chosen = self._preferred(question, prices, units) or programme.chosen(solved)
        answer = self._answer(prices, solved.status, cards.cards_of(question, chosen), bound, lp)
        return replace(answer, proof_s=proof_s)

    def _of_fixed(self, prices: Prices, units: int, count: int) -> Packing:
        question = self.question
        if question.survive == "card":
            best = card_loss.on_fixed(question, prices, self.limits, self._preferred, count)
            return self._answer(prices, best.status, best.cards, units, units)
        programme = Cutting(question, prices, cards=(count, count))
        solved = programme.minimise({}, self.limits)
        if not solved.found:
            return _nothing(solved.status, self.limits)
        chosen = self._preferred(question, prices, units, (count, count)) or programme.chosen(solved)
        return self._answer(prices, "optimal", cards.cards_of(question, chosen), units, units)

    def _preferred(
        self,
        question: Question,
        prices: Prices,
        units: float,
        count: tuple[float, float] = (0, math.inf),
        slack: float = 1.0,
    ) -> Chosen | None:
        """Of the plans of this cost the one preferred; None where the limits end before one is found."""
        limits = Limits(min(self.limits.seconds, PREFERENCE_SECONDS), PREFERENCE_GAP, PREFERENCE_NODES)
        states, disturbed = States(), math.inf
        if question.current and question.survive != "card":
            states = states_of(question)
            programme = Cutting(question, prices, cards=count, slack=slack, cost_max=units, states=states)
            solved = programme.minimise(programme.disturbed(), replace(limits, gap=0.0, nodes=None))
            if not solved.found:
                return None
            disturbed = round(solved.objective)
        headroom = question.prefer == "headroom" and any(question.demands.values())

        def cutting(growth_max: float) -> Cutting:
            return Cutting(
                question,
                prices,
                growth=(1.0, growth_max),
                cards=count,
                slack=slack,
                cost_max=units,
                states=states,
                disturbed_max=disturbed,
            )

        programme = cutting(GROWTH_MAX if headroom else 1.0)
        if headroom:  # with a bound that is near, HiGHS finds less to repair
            most_growth = -programme.programme.relaxed({programme.growth: -1.0})
            programme = cutting(max(1.0, most_growth * 1.001))
        occupied = programme.occupied()
        if headroom:
            most = max(units / min(prices.units), 1.0)
            occupied = {v: share * ROOM / most for v, share in occupied.items()} | {programme.growth: -1.0}
        solved = programme.minimise(occupied, limits)
        return programme.chosen(solved) if solved.found else None

    def _answer(self, prices: Prices, status: str, found: tuple[CardUsed, ...], bound: float, lp: float) -> Packing:
        if not found:
            return _nothing(status, self.limits)
        price = math.fsum(card.kind.price_per_hour for card in found)
        packing = Packing(
            "optimal" if status == "optimal" or price <= bound * prices.unit * (1 + 1e-9) else "feasible",
            found,
            cost_per_hour=price,
            lp_bound_per_hour=lp * prices.unit,
            bound_per_hour=min(bound * prices.unit, price),
            destroyed=_destroyed(self.question, found),
        )
        return replace(packing, growth=_growth(self.question.demands, packing.capacities()))


def states_of(question: Question) -> States:
    """The ways that cards are cut now, and every layout that each could get."""
    kinds = {kind.gpu.name: i for i, kind in enumerate(question.kinds)}
    counts: Counter[tuple[int, tuple[tuple[str, int], ...]]] = Counter()
    for card in question.current:
        if (i := kinds.get(card.gpu)) is not None:
            counts[(i, cards.instances_of(question.kinds[i].gpu, card))] += 1
    columns = [
        Column(i, layout, state, cards.kept(question.kinds[i].gpu, layout, there))
        for state, (i, there) in enumerate(counts)
        if there
        for layout in question.kinds[i].layouts
    ]
    serving = Counter(
        (card.gpu, mig.profile(question.kinds[kinds[card.gpu]].gpu, i.profile, key="current").name, i.model)
        for card in question.current
        for i in card.instances
        if i.model is not None and card.gpu in kinds
    )
    return States([c for c in columns if c.kept], dict(enumerate(counts.values())), serving)


def _destroyed(question: Question, found: tuple[CardUsed, ...]) -> int:
    there = sum(len(card.instances) for card in question.current)
    return there - sum(s.kept for card in found for s in card.slices)


def _growth(demands: Mapping[str, float], capacities: Mapping[str, float]) -> float:
    return min((capacities[model] / demand for model, demand in demands.items() if demand > 0), default=math.inf)


def _nothing(status: str, limits: Limits) -> Packing:
    if status == "infeasible":
        return Packing("not possible")
    return Packing("unknown", why=f"no plan was found in {limits.seconds:g} s")
